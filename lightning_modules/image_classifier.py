"""Image classification."""

from __future__ import annotations

from typing import Any, Literal

from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from zoo.implicit import Gradient, Solver

from .base import EquilibriumModule

Batch = tuple[Tensor, Tensor]


class ImageClassifier(EquilibriumModule):
    """Image classification with an equilibrium model: cross-entropy, and accuracy over all samples.

    Logs ``{train,val,test}/loss`` and ``/accuracy`` beside the solver's statistics.

    Args:
        model: a name of ``zoo.list_models()``.
        num_classes: number of classes. Another number than the pretrained weights' leaves the classifier at random.
        model_args: further arguments of the model, plain numbers and words.
        pretrained: start from these weights, a name of ``zoo.list_weights()``.
        solver: how the equilibrium is solved, like ``Anderson``; the model's own choice if not given.
        gradient: how the equilibrium is differentiated, like ``ImplicitGradient``; likewise.
        jacobian_weight: weight of the Jacobian penalty in the training loss.
        jacobian_frequency: the fraction of training steps, drawn at random, that have the penalty.
        label_smoothing: of the cross-entropy in training, in [0, 1).
        lr: peak learning rate of AdamW, unless ``--optimizer`` chooses another optimizer.
        weight_decay: of AdamW.
        schedule: of the learning rate over the whole run, per step: ``cosine`` to zero, or ``constant``.

    Shape:
        batches are ``(image (B, C, H, W) in [0, 1], label (B,))``.
    """

    def __init__(
        self,
        model: str = "tanh_deq",
        num_classes: int = 10,
        model_args: dict[str, Any] | None = None,
        pretrained: str | None = None,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        jacobian_weight: float = 0.0,
        jacobian_frequency: float = 1.0,
        label_smoothing: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing takes a number in [0, 1); given: {label_smoothing!r}")
        if "num_classes" in (model_args or {}):
            raise ValueError("num_classes is an argument of its own, beside model_args, and not one of them")
        super().__init__(
            model=model,
            model_args={**(model_args or {}), "num_classes": num_classes},
            pretrained=pretrained,
            solver=solver,
            gradient=gradient,
            jacobian_weight=jacobian_weight,
            jacobian_frequency=jacobian_frequency,
            lr=lr,
            weight_decay=weight_decay,
            schedule=schedule,
        )
        self.save_plain_hyperparameters(
            model=model,
            num_classes=num_classes,
            model_args=model_args,
            pretrained=pretrained,
            solver=solver,
            gradient=gradient,
            jacobian_weight=jacobian_weight,
            jacobian_frequency=jacobian_frequency,
            label_smoothing=label_smoothing,
            lr=lr,
            weight_decay=weight_decay,
            schedule=schedule,
        )
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def setup(self, stage: str) -> None:
        """Refuse data of another number of classes, before anything is computed."""
        theirs = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if theirs not in (None, self.num_classes):
            raise MisconfigurationException(
                f"the data have {theirs} classes, and the model was asked for {self.num_classes}: "
                f"give it num_classes={theirs} (--model.num_classes {theirs})"
            )

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> logits ``(B, num_classes)``."""
        logits: Tensor = self.model(image)
        return logits

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Cross-entropy plus the Jacobian term."""
        image, label = batch
        logits, jacobian_term = self.regularized(image, "train")
        loss = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        self.train_accuracy(logits, label)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=label.numel())
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=label.numel())
        return loss + jacobian_term

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Cross-entropy and accuracy."""
        self._evaluate("val", self.val_accuracy, batch, batch_index)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Cross-entropy and accuracy."""
        self._evaluate("test", self.test_accuracy, batch, batch_index)

    def predict_step(self, batch: Batch | Tensor, batch_index: int) -> dict[str, Tensor]:
        """The most probable class and its probability; the label too where the batch has one."""
        image, *rest = (batch,) if isinstance(batch, Tensor) else batch
        probability, prediction = self(image).softmax(dim=1).max(dim=1)
        columns = {"prediction": prediction, "probability": probability}
        return {**columns, "label": rest[0]} if rest else columns

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: Batch, batch_index: int) -> None:
        image, label = batch
        logits = self.observed(image, stage, batch_index)
        accuracy(logits, label)
        loss = F.cross_entropy(logits, label)
        size = label.numel()
        self.log(f"{stage}/loss", loss, on_epoch=True, batch_size=size, sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, on_epoch=True, prog_bar=True, batch_size=size)

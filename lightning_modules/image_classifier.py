"""Image classification."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from zoo import InputError

from .base import EquilibriumModule
from .options import with_own
from .samples import class_names, classified, show
from .targets import check_targets

Batch = tuple[Tensor, Tensor]


class ImageClassifier(EquilibriumModule):
    """Image classification with an equilibrium model: cross-entropy, and accuracy over all samples.

    Logs ``{train,val,test}/loss`` and ``/accuracy`` beside the solver's statistics, and ``/accuracy_top5`` where there
    are more than 10 classes.

    Args:
        model: a name of ``zoo.list_models()``.
        num_classes: number of classes. Another number than the pretrained weights' leaves the classifier at random.
        model_args: further arguments of the model, plain numbers and words.
        label_smoothing: of the cross-entropy in training, in [0, 1).
        options: see :class:`EquilibriumModule`.

    Shape:
        batches are ``(image (B, C, H, W) in [0, 1], label (B,))``.
    """

    def __init__(
        self,
        model: str = "tanh_deq",
        num_classes: int = 10,
        model_args: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing takes a number in [0, 1); given: {label_smoothing!r}")
        super().__init__(model=model, model_args=with_own(model_args, num_classes=num_classes), **options)
        self.save_plain_hyperparameters(num_classes=num_classes, model_args=model_args, label_smoothing=label_smoothing)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        metrics: dict[str, Any] = {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 10:
            metrics["accuracy_top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        self.train_metrics = MetricCollection(metrics, prefix="train/", compute_groups=False)
        self.val_metrics = self.train_metrics.clone(prefix="val/")
        self.test_metrics = self.train_metrics.clone(prefix="test/")

    def setup(self, stage: str) -> None:
        """Refuse data of another number of classes, before anything is computed."""
        self.refuse_data_unless(num_classes=self.num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> logits ``(B, num_classes)``."""
        logits: Tensor = self.model(image)
        return logits

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Cross-entropy plus the Jacobian term."""
        image, label = batch
        logits, jacobian_term = self.regularized("train", image)
        self._check_labels(logits, label)
        loss = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        if loss.isfinite():  # else the step is skipped
            self.train_metrics.update(logits, label)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=label.numel())
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True, batch_size=label.numel())
        return loss + jacobian_term

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Cross-entropy and accuracy."""
        self._evaluate("val", self.val_metrics, batch, batch_index)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Cross-entropy and accuracy."""
        self._evaluate("test", self.test_metrics, batch, batch_index)

    def predict_step(self, batch: Batch | Tensor, batch_index: int) -> dict[str, Tensor]:
        """The most probable class and its probability; the label too where the batch has one."""
        image, *rest = (batch,) if isinstance(batch, Tensor) else batch
        probability, prediction = self(image).softmax(dim=1).max(dim=1)
        columns = {"prediction": prediction, "probability": probability}
        return {**columns, "label": rest[0]} if rest else columns

    def _evaluate(self, stage: str, metrics: MetricCollection, batch: Batch, batch_index: int) -> None:
        image, label = batch
        logits = self.observed(stage, batch_index, image)
        self._check_labels(logits, label)
        metrics.update(logits, label)
        size = label.numel()
        self.log(f"{stage}/loss", F.cross_entropy(logits, label), on_epoch=True, batch_size=size, sync_dist=True)
        self.log_dict(metrics, on_epoch=True, prog_bar=True, batch_size=size)
        if self.shows(stage, batch_index):
            show(self.trainer, "val/samples", lambda: classified(image, logits, label, class_names(self.trainer)))

    @staticmethod
    def _check_labels(logits: Tensor, label: Tensor) -> None:
        """Raise InputError for labels that are not one class an image, or a model that is no classifier."""
        if logits.dim() != 2:
            raise InputError(
                f"ImageClassifier takes a model that gives logits (B, num_classes); this one gave shape "
                f"{tuple(logits.shape)}. SemanticSegmenter takes models that give a map of them"
            )
        B, C = logits.shape
        check_targets("labels", label, (B,), "an image", C)

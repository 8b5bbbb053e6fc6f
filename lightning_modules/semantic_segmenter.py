"""Semantic segmentation: a class for each pixel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from zoo import InputError

from .base import EquilibriumModule
from .options import with_own
from .samples import class_names, segmented, show
from .targets import check_targets

Batch = tuple[Tensor, Tensor]


class SemanticSegmenter(EquilibriumModule):
    """Semantic segmentation with an equilibrium model: cross-entropy, mean intersection over union, pixel accuracy.

    Logs ``{train,val,test}/loss``, ``/miou`` and ``/pixel_accuracy`` beside the solver's statistics. All are over the
    pixels whose label is not ``ignore_index``: the loss as a mean by their weights, the others from one confusion
    matrix of an epoch. The mIoU is the mean of IoU_c = TP_c / (TP_c + FP_c + FN_c) over the classes c that occur, as
    labels or as predictions, but for a class whose index is ``ignore_index``.

    Args:
        model: a name of ``zoo.list_models()``, of a model that gives logits at the size of its input.
        num_classes: number of classes. Another number than the pretrained weights' leaves the classifier at random.
        model_args: further arguments of the model, plain numbers and words.
        ignore_index: the label of pixels that do not count.
        class_weights: one number a class, by which the loss of its pixels is weighted, in training and evaluation.
        options: see :class:`EquilibriumModule`.

    Shape:
        batches are ``(image (B, C, H, W) in [0, 1], label int64 (B, H, W))``.

    Raises:
        ValueError: an argument is not as described.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: str = "mdeq_segmenter",
        num_classes: int = 19,
        model_args: dict[str, Any] | None = None,
        ignore_index: int = 255,
        class_weights: list[float] | None = None,
        **options: Any,
    ) -> None:
        weights = class_weights
        if weights is not None and not (len(weights) == num_classes and all(map(_is_weight, weights)) and any(weights)):
            raise ValueError(
                f"class_weights takes a number >= 0 for each of {num_classes} classes, not all 0; given: {weights!r}"
            )
        super().__init__(model=model, model_args=with_own(model_args, num_classes=num_classes), **options)
        self.save_plain_hyperparameters(
            num_classes=num_classes, model_args=model_args, ignore_index=ignore_index, class_weights=class_weights
        )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        # A choice like any other argument, and no part of the state.
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)
        counted: dict[str, Any] = {"ignore_index": ignore_index, "validate_args": False}  # labels are checked here
        self.train_metrics = MetricCollection(
            {
                "miou": MulticlassJaccardIndex(num_classes, average="macro", **counted),
                "pixel_accuracy": MulticlassAccuracy(num_classes, average="micro", **counted),
            },
            prefix="train/",
            compute_groups=False,
        )
        self.val_metrics = self.train_metrics.clone(prefix="val/")
        self.test_metrics = self.train_metrics.clone(prefix="test/")

    def setup(self, stage: str) -> None:
        """Refuse data of another number of classes, or with another label for what is ignored."""
        self.refuse_data_unless(num_classes=self.num_classes, ignore_index=self.ignore_index)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> logits ``(B, num_classes, H, W)``."""
        logits: Tensor = self.model(image)
        return logits

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Cross-entropy plus the Jacobian term."""
        image, label = batch
        logits, jacobian_term = self.regularized("train", image)
        loss, _ = self._loss(logits, label, self.of_joint_batch)
        if loss.isfinite():  # else the step is skipped
            self.train_metrics.update(logits.argmax(dim=1), label)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(label))
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True, batch_size=len(label))
        return loss + jacobian_term

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Cross-entropy, mIoU and pixel accuracy."""
        self._evaluate("val", self.val_metrics, batch, batch_index)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Cross-entropy, mIoU and pixel accuracy."""
        self._evaluate("test", self.test_metrics, batch, batch_index)

    def predict_step(self, batch: Batch | Tensor, batch_index: int) -> dict[str, Tensor]:
        """The most probable class of each pixel, ``(B, H, W)``: uint8, or int64 for more than 256 classes."""
        image = batch if isinstance(batch, Tensor) else batch[0]
        label_map = self(image).argmax(dim=1)
        return {"label_map": label_map.to(torch.uint8) if self.num_classes <= 256 else label_map}

    def _evaluate(self, stage: str, metrics: MetricCollection, batch: Batch, batch_index: int) -> None:
        image, label = batch
        logits = self.observed(stage, batch_index, image)
        loss, weight = self._loss(logits, label)
        metrics.update(logits.argmax(dim=1), label)
        self.log(f"{stage}/loss", loss, on_epoch=True, batch_size=weight, sync_dist=True)
        self.log_dict(metrics, on_epoch=True, prog_bar=True, batch_size=len(label))
        if self.shows(stage, batch_index):
            given = (image, logits.argmax(dim=1), label, self.ignore_index)
            show(self.trainer, "val/samples", lambda: segmented(*given, class_names(self.trainer)))

    def _loss(
        self, logits: Tensor, label: Tensor, divisor: Callable[[Tensor], Tensor] = lambda weight: weight
    ) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy over the pixels that count, 0 if there is none, and the sum of their weights.

        Args:
            logits: ``(B, C, H, W)``.
            label: ``(B, H, W)``.
            divisor: of the sum of the pixels' weights, what the sum of their cross-entropy is divided by.

        Raises:
            InputError: labels of another shape than the logits, or outside [0, num_classes) and not ignore_index; or a
                model that is no segmenter.
        """
        if logits.dim() != 4:
            raise InputError(
                f"SemanticSegmenter takes a model that gives logits (B, num_classes, H, W); this one gave shape "
                f"{tuple(logits.shape)}. ImageClassifier takes models that give one class an image"
            )
        B, C, *size = logits.shape
        check_targets("labels", label, (B, *size), "a pixel", C, self.ignore_index)
        counts = label != self.ignore_index
        weights = self.class_weights
        total = F.cross_entropy(logits, label, weight=weights, ignore_index=self.ignore_index, reduction="sum")
        weight = counts.sum().float() if weights is None else (weights[label.where(counts, 0)] * counts).sum()
        divided_by = divisor(weight)
        return total / torch.where(divided_by > 0, divided_by, 1), weight


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf

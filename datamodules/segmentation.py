"""What the semantic segmentation sets share."""

from __future__ import annotations

from .base import D, LabelledDataModule


class SegmentationDataModule(LabelledDataModule[D]):
    """A semantic segmentation set; a subclass names its classes and says how it is loaded.

    Batches are ``(images float32 (B, C, H, W) in [0, 1], labels int64 (B, H, W))``. Nothing is normalised: the models
    do that themselves.

    Attributes:
        ignore_index: the label of pixels that count neither in the loss nor in the metrics.
    """

    ignore_index: int = 255

"""What the optical flow sets share."""

from __future__ import annotations

from torch import Tensor

from .base import D, SplitDataModule, whole_number

FlowSample = tuple[Tensor, Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""``(image1, image2, flow, valid)``, or with ``occluded`` after them; see :class:`FlowDataModule`."""


class FlowDataModule(SplitDataModule[D]):
    """An optical flow set; a subclass says how it is loaded.

    Batches are ``(image1, image2, flow, valid)`` or, where it is known, ``(image1, image2, flow, valid, occluded)``:

    - images: float32 ``(B, 3, H, W)`` in [0, 1]. Nothing is normalised: the models do that themselves.
    - flow: float32 ``(B, 2, H, W)``, in pixels. What image 1 shows at (x, y) is at (x + u, y + v) in image 2, with
      u = ``flow[:, 0]``, to the right, and v = ``flow[:, 1]``, downwards. Where it is not known it is 0.
    - valid: bool ``(B, H, W)``, where the flow is known.
    - occluded: bool ``(B, H, W)``, pixels of image 1 that are hidden in image 2 or outside of it. Their flow is known
      all the same.

    A set of sequences gives ``(frames (B, T, 3, H, W), flow (B, T-1, 2, H, W), valid (B, T-1, H, W),
    occluded (B, T-1, H, W))``; ``flow[:, t]`` is from frame t to frame t + 1.

    Args:
        batch_size: pairs, or sequences, a batch of training, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        eval_batch_size: those a batch of validation, test and prediction; by default ``batch_size``. It is 1 where
            images have different sizes.
    """

    def __init__(self, batch_size: int = 8, num_workers: int = 0, eval_batch_size: int | None = None) -> None:
        super().__init__(batch_size, num_workers)
        size = self.batch_size if eval_batch_size is None else eval_batch_size
        self._eval_batch_size = whole_number("eval_batch_size", size, at_least=1)

    @property
    def eval_batch_size(self) -> int:
        return self._eval_batch_size

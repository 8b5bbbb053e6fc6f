"""How far estimated optical flow is from the truth, counted pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

_SUMS = (
    *("pixels", "error", "length", "below_1", "below_3", "outliers", "images", "image_errors"),
    *("visible", "visible_error", "occluded", "occluded_error"),
)


class FlowErrors(Metric):
    """The published measures of optical flow, over all pixels of all batches and processes whose flow is known.

    With e = |flow - target| and l = |target|, both in pixels:

    - ``epe``: the mean of e, the end-point error. ``epe_zero``: that of no motion at all, the mean of l.
    - ``epe_per_image``: the mean over images of the mean of e in each, as KITTI's is published.
    - ``1px``, ``3px``: the fraction of pixels with e < 1, and with e < 3.
    - ``f1_all``: the fraction with e > 3 and e > 5 % of l (Menze and Geiger, CVPR 2015).
    - ``epe_visible``, ``epe_occluded``: the mean of e over pixels that are seen in the second image, and over others.

    Sums are of float64: no pixel is lost, however many there are. A flow that is not finite makes the means so.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(_SUMS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, flow: Tensor, target: Tensor, valid: Tensor, occluded: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            flow, target: ``(B, 2, H, W)``, in pixels.
            valid: bool ``(B, H, W)``, where the target is known.
            occluded: bool ``(B, H, W)``, which pixels are not seen in the second image; None where nobody knows.
        """
        error = (flow.detach().double() - target.double()).square().sum(dim=1).sqrt()
        length = target.double().square().sum(dim=1).sqrt()
        known = valid.flatten(1).sum(dim=1)
        of_images = error.where(valid, 0).flatten(1).sum(dim=1)
        nothing = torch.zeros_like(valid)
        seen, hidden = (nothing, nothing) if occluded is None else (valid & ~occluded, valid & occluded)
        self.sums += torch.stack(
            [
                x.sum().double()
                for x in (
                    *(known, of_images, length.where(valid, 0)),
                    *(valid & (error < 1), valid & (error < 3), valid & ~((error <= 3) | (error <= 0.05 * length))),
                    *(known > 0, of_images / known.clamp_min(1)),
                    *(seen, error.where(seen, 0), hidden, error.where(hidden, 0)),
                )
            ]
        )

    def compute(self) -> dict[str, Tensor]:
        """The measures by name, those left out of which no pixel tells."""
        sums = dict(zip(_SUMS, self.sums, strict=True))
        quotients = {
            "epe": ("error", "pixels"),
            "epe_per_image": ("image_errors", "images"),
            "epe_zero": ("length", "pixels"),
            "1px": ("below_1", "pixels"),
            "3px": ("below_3", "pixels"),
            "f1_all": ("outliers", "pixels"),
            "epe_visible": ("visible_error", "visible"),
            "epe_occluded": ("occluded_error", "occluded"),
        }
        return {
            name: (sums[over] / sums[under]).float() for name, (over, under) in quotients.items() if sums[under] > 0
        }

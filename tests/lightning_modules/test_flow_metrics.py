"""The published measures of optical flow, counted one pixel after another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.flow_metrics import FlowErrors

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


def by_hand(flow: Tensor, target: Tensor, valid: Tensor, occluded: Tensor) -> dict[str, float]:
    """Pixel by pixel, in plain Python."""
    pixels: list[tuple[float, float, bool]] = []
    per_image = []
    for found, true, known, hidden in zip(flow, target, valid, occluded, strict=True):
        image = [
            (math.dist(found[:, y, x].tolist(), true[:, y, x].tolist()), math.hypot(*true[:, y, x].tolist()), h)
            for y, row in enumerate(known.tolist())
            for x, k in enumerate(row)
            for h in [bool(hidden[y, x])]
            if k
        ]
        pixels += image
        if image:
            per_image.append(sum(e for e, _, _ in image) / len(image))

    def mean(values: list[Any]) -> float:
        return sum(values) / len(values)

    found_ = {}
    if pixels:
        found_ = {
            "epe": mean([e for e, _, _ in pixels]),
            "epe_zero": mean([length for _, length, _ in pixels]),
            "epe_per_image": mean(per_image),
            "1px": mean([e < 1 for e, _, _ in pixels]),
            "3px": mean([e < 3 for e, _, _ in pixels]),
            "f1_all": mean([e > 3 and e > 0.05 * length for e, length, _ in pixels]),
        }
    for name, wanted in (("epe_visible", False), ("epe_occluded", True)):
        if some := [e for e, _, hidden in pixels if hidden is wanted]:
            found_[name] = mean(some)
    return found_


@settings(max_examples=15, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**31), share=st.sampled_from([0.0, 0.2, 0.8, 1.0]))
def test_measures_are_counted_by_hand(size: Any, seed: int, share: float) -> None:
    """Over two batches, whatever is in which."""
    B, H, W = size
    generator = torch.Generator().manual_seed(seed)
    target = 60 * torch.randn(B, 2, H, W, generator=generator)
    flow = target + 4 * torch.randn(B, 2, H, W, generator=generator)
    valid, occluded = torch.rand(2, B, H, W, generator=generator) < share
    target[~valid.unsqueeze(1).expand_as(target)] = math.nan  # what is not known is not looked at
    errors = FlowErrors()
    for part in (slice(0, 1), slice(1, None)):
        errors.update(flow[part], target[part], valid[part], occluded[part])
    assert {name: value.item() for name, value in errors.compute().items()} == pytest.approx(
        by_hand(flow, target, valid, occluded), rel=1e-5
    )


def test_the_outliers_of_kitti_are_counted_pixel_by_pixel() -> None:
    """Both conditions are of the same pixel: of the errors 2, 4, 4 and 10 at lengths 10, 10, 100 and 100, two are."""
    target = torch.tensor([[[[10.0, 10, 100, 100]], [[0.0, 0, 0, 0]]]])
    flow = target + torch.tensor([[[[0.0, 0, 0, 0]], [[2.0, 4, 4, 10]]]])
    errors = FlowErrors()
    errors.update(flow, target, torch.ones(1, 1, 4, dtype=torch.bool))
    assert errors.compute()["f1_all"] == 0.5
    assert set(errors.compute()) == {"epe", "epe_per_image", "epe_zero", "1px", "3px", "f1_all"}


def test_a_flow_that_is_not_finite_is_not_hidden() -> None:
    errors = FlowErrors()
    errors.update(
        torch.tensor([[[[0.0, math.nan]], [[0.0, 1.0]]]]), torch.zeros(1, 2, 1, 2), torch.ones(1, 1, 2).bool()
    )
    found = errors.compute()
    assert found["epe"].isnan()
    assert (found["f1_all"], found["1px"], found["3px"]) == (0.5, 0.5, 0.5)


def test_no_pixel_is_lost_among_many() -> None:
    """float32 would stop counting at 2^24."""
    errors = FlowErrors()
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    errors.update(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), one)
    errors.sums *= 2**25
    errors.update(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), one)
    assert errors.sums[0] == 2**25 + 1

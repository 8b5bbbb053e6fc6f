"""The correlation pyramid and its look-up against plain loops, and against torchvision's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.optical_flow.raft import CorrBlock

from zoo.correlation import correlation_pyramid, look_up
from zoo.flow import pixel_grid


def maps(B: int, D: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    F1, F2 = torch.randn(2, B, D, h, w, generator=generator, dtype=torch.float64)
    return F1, F2


def test_the_pyramid_is_its_equation() -> None:
    F1, F2 = maps(2, 3, 4, 6)
    first, second = correlation_pyramid(F1, F2, 2)
    expected = torch.einsum("bdij,bdkl->bijkl", F1, F2) / math.sqrt(3)
    torch.testing.assert_close(first.view(2, 4, 6, 4, 6), expected)
    pooled = expected.view(2, 4, 6, 2, 2, 3, 2).mean(dim=(4, 6))
    torch.testing.assert_close(second.view(2, 4, 6, 2, 3), pooled)


def bilinear(C: Tensor, x: float, y: float) -> float:
    """Of ``(H, W)``, 0 outside."""
    H, W = C.shape
    total = 0.0
    for X in (math.floor(x), math.floor(x) + 1):
        for Y in (math.floor(y), math.floor(y) + 1):
            if 0 <= X < W and 0 <= Y < H:
                total += float(C[Y, X]) * (1 - abs(x - X)) * (1 - abs(y - Y))
    return total


def test_a_look_up_is_its_equation() -> None:
    F1, F2 = maps(1, 3, 4, 6)
    pyramid = correlation_pyramid(F1, F2, 2)
    c = pixel_grid(F1) + 2 * torch.randn(1, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = look_up(pyramid, c, radius=1)
    assert found.shape == (1, 18, 4, 6)
    for i, j in ((0, 0), (3, 2), (1, 5)):
        x, y = c[0, :, i, j].tolist()
        expected = [
            bilinear(pyramid[level][0, 6 * i + j], x / 2**level + dx, y / 2**level + dy)
            for level in range(2)
            for dx in (-1, 0, 1)
            for dy in (-1, 0, 1)
        ]
        torch.testing.assert_close(found[0, :, i, j], torch.tensor(expected, dtype=torch.float64))


@settings(max_examples=8, deadline=None)
@given(B=st.integers(1, 3), h=st.integers(16, 20), w=st.integers(16, 21), radius=st.integers(1, 4))
def test_it_is_torchvisions(B: int, h: int, w: int, radius: int) -> None:
    F1, F2 = maps(B, 4, h, w)  # sqrt(4): torchvision divides by a float32 root
    theirs = CorrBlock(num_levels=4, radius=radius)
    theirs.build_pyramid(F1, F2)
    noise = torch.randn(B, 2, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    c = pixel_grid(F1) + 5 * noise
    found = look_up(correlation_pyramid(F1, F2, 4), c, radius)
    torch.testing.assert_close(found, theirs.index_pyramid(c), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_reach_features_and_places(dtype: torch.dtype) -> None:
    F1, F2 = (F.to(dtype).requires_grad_() for F in maps(1, 2, 4, 4))
    c = (pixel_grid(F1) + 0.3).detach().requires_grad_()
    look_up(correlation_pyramid(F1, F2, 2), c, 1).sin().sum().backward()
    for x in (F1, F2, c):
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert x.grad.abs().sum() > 0

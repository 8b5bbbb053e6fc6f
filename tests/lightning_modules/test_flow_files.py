"""Flow in files and in colours: read again by torchvision, and by eye."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.datasets._optical_flow import _read_16bits_png_with_flow_and_valid_mask, _read_flo
from torchvision.utils import flow_to_image

from lightning_modules.flow_files import colour_picture, comparison, longest, write_flo, write_kitti
from lightning_modules.png import write_png

# torchvision's reader of KITTI's files is its own deprecated decoder of images.
deprecated = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30))


def some_flow(size: tuple[int, int], seed: int, scale: float = 30.0) -> Tensor:
    return scale * torch.randn(2, *size, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=12, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_flo_is_read_again(tmp_path_factory: Any, size: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    flow, path = some_flow(size, seed).to(dtype), tmp_path_factory.mktemp("flo") / "some.flo"
    write_flo(path, flow)
    assert np.array_equal(_read_flo(str(path)), flow.float().numpy())


def test_flo_byte_by_byte(tmp_path: Path) -> None:
    """As Middlebury describes it: tag, width, height, then u and v of the first row from left to right, and so on."""
    flow = torch.tensor([[[1.0, 2, 3], [4, 5, 6]], [[-1.0, -2, -3], [-4, -5, -6]]])
    write_flo(tmp_path / "some.flo", flow)
    expected = struct.pack("<fii12f", 202021.25, 3, 2, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6)
    assert (tmp_path / "some.flo").read_bytes() == expected
    assert expected.startswith(b"PIEH")


@deprecated
@settings(max_examples=12, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**31))
def test_kittis_png_is_read_again(tmp_path_factory: Any, size: tuple[int, int], seed: int) -> None:
    """To 1/128 of a pixel, everywhere known."""
    flow, path = some_flow(size, seed), tmp_path_factory.mktemp("kitti") / "some.png"
    write_kitti(path, flow)
    found, valid = _read_16bits_png_with_flow_and_valid_mask(str(path))
    assert np.abs(found - flow.numpy()).max() <= 1 / 128 + 1e-6
    assert valid.all()


@deprecated
def test_kittis_png_has_no_room_for_more(tmp_path: Path) -> None:
    """What cannot be written is not known."""
    u, v = [-513.0, 0, torch.nan, torch.inf, 511.5], [0.0, 600, 0, 0, -512]
    write_kitti(tmp_path / "some.png", torch.tensor([[u], [v]]))
    found, valid = _read_16bits_png_with_flow_and_valid_mask(str(tmp_path / "some.png"))
    assert valid.tolist() == [[False, False, False, False, True]]
    assert found[:, 0, 4].tolist() == [511.5, -512]


@settings(max_examples=12, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**31))
def test_colours_are_read_again(tmp_path_factory: Any, size: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    path = tmp_path_factory.mktemp("png") / "some.png"
    write_png(path, image)
    with Image.open(path) as png:
        assert png.mode == "RGB"
        assert np.array_equal(np.asarray(png), image.permute(1, 2, 0).numpy())


# ---------------------------------------------------------------------------------------------------------- pictures


def test_colours_are_torchvisions() -> None:
    flow = some_flow((7, 9), 0)
    difference = colour_picture(flow).int() - flow_to_image(flow).int()
    assert difference.abs().max() <= 1
    assert longest(flow) == pytest.approx(flow.norm(dim=0).max().item())


def test_a_scale_is_where_colours_end() -> None:
    """Twice the scale has the colour of the scale itself; half of it is paler."""
    flow = torch.zeros(2, 1, 4)
    flow[0] = torch.tensor([0.0, 2.0, 4.0, 8.0])
    picture = colour_picture(flow, torch.tensor(4.0))[:, 0].int()
    assert picture[:, 0].tolist() == [255, 255, 255]
    assert (picture[:, 2] - picture[:, 3]).abs().max() <= 1
    assert picture[:, 1].sum() > picture[:, 2].sum() + 100
    assert not torch.equal(picture, colour_picture(flow)[:, 0].int()), "without a scale it ends at the longest"


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_what_does_not_move_or_is_not_finite_is_white(value: float) -> None:
    flow = torch.full((2, 2, 3), value)
    assert torch.equal(colour_picture(flow), torch.full((3, 2, 3), 255, dtype=torch.uint8))
    flow[:, 0, 0] = 1.0
    picture = colour_picture(flow)
    assert (picture[:, 1:] == 255).all()
    assert not (picture[:, 0, 0] == 255).all()
    assert longest(flow) == pytest.approx(2**0.5)


def test_a_comparison_is_image_target_and_flow() -> None:
    """Each sample on a scale of its own, which is its target's."""
    image = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    target = torch.stack([some_flow((5, 6), seed, 10.0**seed) for seed in range(4)])
    picture = comparison(image, target, target.clone(), samples=3)
    assert (picture.shape, picture.dtype) == ((3, 15, 18), torch.uint8)
    assert torch.equal(picture[:, :, 6:12], picture[:, :, 12:])
    assert torch.equal(picture[:, :5, :6], (255 * image[0]).round().to(torch.uint8))
    for row in range(3):
        assert torch.equal(picture[:, 5 * row : 5 * row + 5, 6:12], colour_picture(target[row]))
    wild = comparison(image, target, 1000 * target, samples=1)
    assert torch.equal(wild[:, :, 6:12], picture[:, :5, 6:12]), "a wild estimate leaves the target's colours"
    assert torch.equal(comparison(image[:1], target[:1], target[:1]), picture[:, :5])

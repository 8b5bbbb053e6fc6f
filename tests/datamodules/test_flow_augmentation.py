"""The augmentation of optical flow: whatever is drawn, the flow stays true."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import grid_sample

from datamodules.flow_augmentation import DenseFlowAugmentation, FlowAugmentation, SparseFlowAugmentation

A = torch.tensor([[0.06, -0.03], [0.02, 0.05]])
B = torch.tensor([3.0, -2.0])
"""The flow of these tests at p = (x, y), measured from the image's corner: A p + B."""


class OnlyPlaces:
    """Leaves colours as they are, so that images still tell where their pixels are from."""

    asymmetric = 0.0

    @staticmethod
    def jitter(image: Tensor) -> Tensor:
        return image


class DensePlaces(OnlyPlaces, DenseFlowAugmentation):
    pass


class SparsePlaces(OnlyPlaces, SparseFlowAugmentation):
    pass


class DenseUnsized(DensePlaces):
    """With magnification 1, sizes stay as they are."""

    spare = 0
    stretch = 0.0


class SparseUnsized(SparsePlaces):
    spare = 0


CLEAR = 0.999999
"""What the third channel of :func:`linear_pair` is above where nothing but the images is seen: 1, but for rounding."""


def positions(height: int, width: int) -> Tensor:
    """x and y of the centre of each pixel, measured from the image's corner: ``(2, H, W)``."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y])


def linear(matrix: Tensor, at: Tensor) -> Tensor:
    return torch.einsum("ij,jhw->ihw", matrix, at)


def linear_pair(height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of which the first two channels tell where their pixels come from, in parts of 4 sides of the image.

    Image 2 shows at q what image 1 shows at p, where q = p + A p + B. The third channel is 1 but in the outermost
    pixels: where it is 1 afterwards no border and no erased rectangle, which takes the mean, has weighed in.
    """
    p = positions(height, width)
    origin = linear(torch.linalg.inv(torch.eye(2) + A), p - B.view(2, 1, 1))
    inside = torch.zeros(1, height, width)
    inside[:, 1:-1, 1:-1] = 1
    image1, image2 = (torch.cat([place / (4 * max(height, width)) + 0.3, inside]) for place in (p, origin))
    return image1, image2, linear(A, p) + B.view(2, 1, 1), torch.ones(height, width, dtype=torch.bool)


def seen_at(image: Tensor, at: Tensor) -> Tensor:
    """Image ``(C, H, W)``, bilinearly at places ``(2, H, W)`` in pixels; 0 outside."""
    H, W = image.shape[1:]
    grid = 2 * at / torch.tensor([W - 1, H - 1]).view(2, 1, 1) - 1
    return grid_sample(image[None], grid.permute(1, 2, 0)[None], align_corners=True)[0]


@given(height=st.integers(60, 150), width=st.integers(60, 150), seed=st.integers(0, 2**31))
@example(height=149, width=149, seed=149)  # a pixel of which a part of 3e-4 is erased
@settings(max_examples=40, deadline=None)
def test_image_2_at_the_end_of_the_flow_shows_image_1(height, width, seed):
    """Warping image 2 back by the new flow gives image 1, after any scale, stretch, mirror and crop."""
    torch.manual_seed(seed)
    image1, image2, flow, valid = DensePlaces(48, 56, -0.4, 0.8)(*linear_pair(height, width))
    assert image1.shape == image2.shape == (3, 48, 56)
    assert flow.shape == (2, 48, 56)
    assert flow.dtype == torch.float32
    assert valid.dtype == torch.bool
    assert bool(valid.all())
    shown = seen_at(image2, positions(48, 56) - 0.5 + flow)
    clear = (image1[2] > CLEAR) & (shown[2] > CLEAR)
    of_a_pixel = 4 * max(height, width) * (shown - image1)[:2, clear].abs()
    assert bool((of_a_pixel < 0.01).all())


def test_most_of_each_pair_is_compared_above():
    torch.manual_seed(0)
    shares = []
    for _ in range(40):
        image1, image2, flow, _ = DensePlaces(48, 56, -0.4, 0.8)(*linear_pair(100, 120))
        shown = seen_at(image2, positions(48, 56) - 0.5 + flow)
        shares.append(float(((image1[2] > CLEAR) & (shown[2] > CLEAR)).float().mean()))
    assert sum(share > 0.6 for share in shares) > 20


@given(height=st.integers(40, 120), width=st.integers(40, 120), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_sparse_points_keep_their_targets(height, width, seed):
    """A point comes to the pixel nearest to its new place, with its own vector."""
    torch.manual_seed(seed)
    image1, image2, flow, _ = linear_pair(height, width)
    valid = torch.rand(height, width) < 0.2
    flow = flow * valid
    image1, _, new_flow, new_valid = SparsePlaces(32, 40, -0.3, 0.5)(image1, image2, flow, valid)
    assert bool((new_flow[:, ~new_valid] == 0).all())
    # Image 1 tells each pixel's old place; its slopes are the ratios of the sizes, negative in a mirror image.
    old = (image1[:2] - 0.3) * 4 * max(height, width)
    slope = torch.stack([old[0].diff(dim=-1).median(), old[1].diff(dim=-2).median()])
    assert slope[1] > 0, "sparse pairs are mirrored left to right only"
    vectors = new_flow * slope.view(2, 1, 1)
    expected = linear(A, old) + B.view(2, 1, 1)
    within = A.abs() @ slope.abs() / 2  # half a new pixel
    inner = new_valid & (image1[2] > CLEAR)
    assert bool(((vectors - expected).abs()[:, inner] < within.view(2, 1) + 0.01).all())
    nearest = torch.cdist(vectors[:, new_valid].T, flow[:, valid].T).amin(dim=1)
    assert bool((nearest < 0.01).all()), "each is one of the given vectors, not a mean of some"


def test_sparse_points_are_lost_only_where_two_meet():
    draws = torch.Generator().manual_seed(0)
    valid = torch.rand(30, 40, generator=draws) < 0.3
    flow = torch.randn(2, 30, 40, generator=draws) * valid
    resize = SparseFlowAugmentation(8, 8, 0, 0).resize_flow
    large, large_valid = resize(flow, valid, 45, 80)
    assert torch.equal(large[:, large_valid].sort(dim=1).values, flow[:, valid].sort(dim=1).values)
    assert all(map(torch.equal, resize(flow, valid, 30, 40), (flow, valid)))
    small, small_valid = resize(flow, valid, 15, 10)
    blocks = valid.view(15, 2, 10, 4).any(dim=3).any(dim=1)  # a new pixel holds 2 x 4 old ones
    assert torch.equal(small_valid, blocks)
    last = flow.view(2, 15, 2, 10, 4)[:, :, -1, :, -1]
    mark = valid.view(15, 2, 10, 4)[:, -1, :, -1]
    assert torch.equal(small[:, mark], last[:, mark]), "the later one in the image stays"
    assert not any(bool(each.any()) for each in resize(flow, torch.zeros_like(valid), 45, 80))


def test_unknown_pixels_stay_out_of_dense_flow():
    """A hole whose values are nonsense does not reach the pixels that are known."""
    flow, valid = torch.full((2, 20, 20), 2.0), torch.ones(20, 20, dtype=torch.bool)
    flow[:, 5:9, 5:9], valid[5:9, 5:9] = 1e6, False
    new_flow, new_valid = DenseFlowAugmentation(8, 8, 0, 0).resize_flow(flow, valid, 31, 27)
    assert bool((new_flow[:, ~new_valid] == 0).all())
    assert bool(((new_flow[:, new_valid] - 2).abs() < 0.003).all())
    assert 0.85 < float(new_valid.float().mean()) < 0.97


@pytest.mark.parametrize("kind", [DensePlaces, SparsePlaces])
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_images_smaller_than_the_crop_are_enlarged(kind: type[FlowAugmentation], height, width, seed):
    torch.manual_seed(seed)
    images = torch.rand(2, 3, height, width)
    image1, image2, flow, valid = kind(24, 32, -1.0, -0.5)(
        *images, torch.ones(2, height, width), torch.ones(height, width, dtype=torch.bool)
    )
    assert image1.shape == image2.shape == (3, 24, 32)
    assert valid.shape == (24, 32)
    least = max((24 + kind.spare) / height, (32 + kind.spare) / width)
    assert bool((flow[0, valid].abs() >= least - 0.5 / width - 1e-4).all()), "by at least so much, in whole pixels"
    assert bool((flow[1, valid].abs() >= least - 0.5 / height - 1e-4).all())


def test_sizes_and_mirrors_have_the_published_odds():
    torch.manual_seed(0)
    n, image = 600, torch.zeros(3, 60, 90)
    pair = (image, image, torch.ones(2, 60, 90), torch.ones(60, 90, dtype=torch.bool))
    ends = torch.stack([DensePlaces(30, 40, -0.2, 0.6)(*pair)[2][:, 15, 20] for _ in range(n)])
    u, v = ends.T
    share = {
        "left and right": (u < 0).float().mean(),
        "top and bottom": (v < 0).float().mean(),
        "as it was": (u.abs() == 1).logical_and(v.abs() == 1).float().mean(),
        "stretched": ((u.abs() - v.abs()).abs() > 0.04).float().mean(),  # sizes are whole pixels
    }
    assert {name: pytest.approx(float(value), abs=0.08) for name, value in share.items()} == {
        "left and right": 0.5,
        "top and bottom": 0.1,
        "as it was": 0.2,
        "stretched": 0.49,  # of .64, the others by less than that
    }
    assert share["top and bottom"] > 0.05
    assert 2**-0.42 < float(v.abs().min()) < 2**-0.25
    assert 2**0.65 < float(v.abs().max()) < 2**0.82
    unflipped = DensePlaces(30, 40, -0.2, 0.6, flip=False)
    assert all(bool((unflipped(*pair)[2] > 0).all()) for _ in range(20))


@pytest.mark.parametrize("kind", [DenseUnsized, SparseUnsized])
def test_places_of_the_crop(kind: type[FlowAugmentation]):
    """Dense: each equally likely. Sparse: what is drawn below or beside the image moves to its edge."""
    torch.manual_seed(0)
    image = positions(60, 90)[[0, 1, 1]] - 0.5
    pair = (image, image, torch.zeros(2, 60, 90), torch.ones(60, 90, dtype=torch.bool))
    corners = torch.stack([kind(30, 40, 0, 0, flip=False)(*pair)[0][:2, 0, 0] for _ in range(500)])
    left, top = corners.T
    assert (left.min(), left.max(), top.min(), top.max()) == (0, 50, 0, 30)
    below, beside = kind.overhang
    for at, edge, expected in (
        (left, 0, (beside + 1) / (51 + 2 * beside)),
        (left, 50, (beside + 1) / (51 + 2 * beside)),
        (top, 0, 1 / (31 + below)),
        (top, 30, (below + 1) / (31 + below)),
    ):
        assert float((at == edge).float().mean()) == pytest.approx(expected, abs=0.07)
    assert len(left.unique()) > 40


def test_the_eraser_paints_rectangles_of_the_mean_colour_into_image_2():
    torch.manual_seed(0)
    image = torch.rand(3, 200, 300)
    pair = (image, image, torch.zeros(2, 200, 300), torch.ones(200, 300, dtype=torch.bool))
    augmentation, mean = DenseUnsized(200, 300, 0, 0, flip=False), image.mean(dim=(1, 2))
    shares = []
    for _ in range(100):
        image1, image2, _, _ = augmentation(*pair)
        assert torch.equal(image1, image)
        changed = (image2 != image).any(dim=0)
        torch.testing.assert_close(image2[:, changed], mean.view(3, 1).expand(3, int(changed.sum())))
        shares.append(float(changed.float().sum()))
    erased = [share for share in shares if share > 0]
    assert 35 < len(erased) < 65
    assert 50 * 50 < max(erased) <= 2 * 99 * 99


@pytest.mark.parametrize(
    ("kind", "strength", "odds"), [(DenseFlowAugmentation, 0.4, 0.2), (SparseFlowAugmentation, 0.3, 0)]
)
def test_colours_change_alike_in_both_images_or_not(kind: type[FlowAugmentation], strength, odds):
    torch.manual_seed(0)
    jitter = kind.jitter
    assert jitter.brightness == jitter.contrast == jitter.saturation == (1 - strength, 1 + strength)
    assert jitter.hue[1] == pytest.approx({0.4: 0.5, 0.3: 0.3}[strength] / math.pi)
    image = torch.rand(3, 150, 200)
    pair = (image, image, torch.zeros(2, 150, 200), torch.ones(150, 200, dtype=torch.bool))
    different, unchanged = 0, 0
    for _ in range(100):
        image1, image2, _, _ = kind(140, 190, 0, 0)(*pair)
        assert 0 <= float(image1.min()) <= float(image1.max()) <= 1
        different += float((image1 == image2).float().mean()) < 0.1
        unchanged += abs(float(image1.mean()) - float(image.mean())) < 1e-4
    assert unchanged < 20
    assert odds * 50 <= different <= odds * 180


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_it_follows_torchs_seed_and_leaves_its_input_alone(seed):
    pair = linear_pair(70, 80)
    copies = [each.clone() for each in pair]
    given = []
    for _ in range(2):
        torch.manual_seed(seed)
        given.append(DenseFlowAugmentation(48, 56, -0.4, 0.8)(*pair))
    assert all(map(torch.equal, *given))
    assert all(map(torch.equal, pair, copies))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 0.0, 0.0), "crop_height is a whole number, at least 1; given: 0"),
        ((10, 1.5, 0.0, 0.0), "crop_width is a whole number, at least 1; given: 1.5"),
        ((10, 10, 0.5, 0.0), "min_scale and max_scale are finite numbers.*given: 0.5 and 0.0"),
        ((10, 10, 0.0, math.nan), "min_scale and max_scale are finite numbers.*given: 0.0 and nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenseFlowAugmentation(*arguments)

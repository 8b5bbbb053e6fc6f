"""Layers of photographs in motion: that the flow is exact, what is occluded, what is fixed and what drawn anew."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from pytorch_lightning import seed_everything
from sklearn.datasets import load_sample_images
from torch import Generator, Tensor
from torch.nn.functional import grid_sample, max_pool2d

from datamodules import FlowDataModule, SyntheticFlowDataModule
from datamodules.base import Splits
from datamodules.synthetic_flow import BANDS, FlowComposer, FlowDataset, NewFlow, photographs_split, shear, unshear
from tests.datamodules.loading import workers


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def smooth_photograph(height: int = 150, width: int = 200) -> Tensor:
    """Waves of 25 to 50 pixels, so that reading between pixels costs next to nothing."""
    x, y = torch.arange(width) / 25, torch.arange(height).view(-1, 1) / 25
    waves = [(2 * math.pi * (a * x + b * y)).sin() for a, b in ((1.0, 0.2), (-0.3, 0.9), (0.5, 0.5))]
    return 0.5 + 0.3 * torch.stack(waves)


def composer(**arguments) -> FlowComposer:
    return FlowComposer([smooth_photograph()], **arguments)


def warped(images: Tensor, flow: Tensor) -> Tensor:
    """``images`` ``(B, 3, H, W)`` read where the flow ``(B, 2, H, W)`` points to."""
    _, _, H, W = images.shape
    x, y = flow[:, 0] + torch.arange(W), flow[:, 1] + torch.arange(H).view(H, 1)
    grid = torch.stack([2 * x / (W - 1) - 1, 2 * y / (H - 1) - 1], dim=-1)
    return grid_sample(images, grid, align_corners=True)


def everything(loader: Iterable[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(entries) for entries in zip(*loader, strict=True)]


def nearest_layers(made: FlowComposer, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Drawn densely: which layer a pixel shows, ``(B, T, H, W)``, and its goal, ``(2, B, T-1, H, W)``."""
    shapes, _ = made._draw(count, seeded(seed))
    x, y = torch.arange(float(made.width)), torch.arange(float(made.height)).view(-1, 1)
    now = shapes.at(..., None, None)
    q = now.own(x, y)
    inside = now.depth(*q) > 0
    inside[0] = True
    order = torch.arange(len(inside)).view(-1, 1, 1, 1, 1)
    nearest = (inside * order).amax(0)
    goals = now.at(slice(None), slice(1, None)).frame(*(v[:, :-1] for v in q))
    chosen = [goal.gather(0, nearest[None, :-1])[0].transpose(0, 1) for goal in goals]
    return nearest.transpose(0, 1), torch.stack(chosen)


# ---------------------------------------------------------------------------------------------------- the flow is exact


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_shear_is_undone(seed):
    a, k, f, b, l, g = (2 * torch.rand(6, dtype=torch.float64, generator=seeded(seed)) - 1).tolist()  # noqa: E741
    parameters = [torch.tensor(v, dtype=torch.float64) for v in (10 * a, k, 9 * f, 10 * b, l, 9 * g)]
    x, y = 100 * torch.rand(2, 50, dtype=torch.float64, generator=seeded(seed))
    x_new, y_new = shear(parameters, x, y)
    assert torch.allclose(x_new, x + 10 * a * torch.sin(k * y + 9 * f))
    assert torch.allclose(y_new, y + 10 * b * torch.sin(l * x_new + 9 * g))
    for back, there in zip(unshear(parameters, x_new, y_new), (x, y), strict=True):
        assert torch.allclose(back, there, atol=1e-12)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), frames=st.integers(2, 6), height=st.integers(16, 90), width=st.integers(16, 90))
def test_points_of_a_layer_go_to_the_frame_and_back(seed, frames, height, width):
    made = composer(frames=frames, height=height, width=width, min_patches=3, max_warp=2.0)
    shapes, _ = made._draw(2, seeded(seed))
    for k in range(4):
        shape = shapes.at(k, ..., None)
        x, y = 100 * torch.rand(2, 30, generator=seeded(seed))
        for back, there in zip(shape.frame(*shape.own(x, y)), (x, y), strict=True):
            assert (back - there).abs().max() < 1e-3


def test_the_place_in_the_frame_is_as_the_docstring_says():
    shapes, _ = composer(min_patches=3)._draw(3, seeded(0))
    x, y = 60 * torch.rand(2, 20, generator=seeded(1)) - 30
    cx, cy, cos, sin, zoom = (v.double().numpy() for v in shapes.place[..., None])
    assert np.allclose(cos**2 + sin**2, 1, atol=1e-6)
    ux, uy = (v.double().numpy() for v in unshear(shapes.warp[..., None].unbind(), x, y))
    expected = (cx + zoom * (cos * ux - sin * uy), cy + zoom * (sin * ux + cos * uy))
    for found, right in zip(shapes.at(..., None).frame(x, y), expected, strict=True):
        assert np.allclose(found.numpy(), right, atol=1e-3)


@pytest.mark.parametrize("frames", [2, 4])
def test_what_a_pixel_shows_is_where_its_flow_points_to(frames):
    """At pixels that are not occluded, except at the soft edges of patches."""
    made = composer(frames=frames, max_warp=2.0)
    shown, flow, occluded = made(6, seeded(3))
    layers, _ = nearest_layers(made, 6, 3)
    images = shown.float() / 255
    first, second, flow, occluded = (v.flatten(0, 1) for v in (images[:, :-1], images[:, 1:], flow, occluded))
    edge = max_pool2d(layers.flatten(0, 1).float(), 5, 1, 2) + max_pool2d(-layers.flatten(0, 1).float(), 5, 1, 2) > 0
    edge = edge.view(6, frames, *edge.shape[1:])
    edge_first, edge_second = (e.flatten(0, 1) for e in (edge[:, :-1], edge[:, 1:]))
    clear = ~occluded & ~edge_first & (warped(edge_second[:, None].float(), flow)[:, 0] == 0)
    assert clear.float().mean() > 0.5

    def error(flow: Tensor) -> Tensor:
        return (warped(second, flow) - first).abs().amax(1)[clear]

    assert error(flow).quantile(0.99) < 0.02, "but where a photograph meets its mirror image"
    assert error(flow).mean() < 0.004, "about one step of 1/255, from two images and three colours"
    assert error(flow + 0.1).mean() > 2 * error(flow).mean(), "a tenth of a pixel would be noticed"
    assert error(0 * flow).mean() > 0.1


@pytest.mark.parametrize("frames", [2, 4])
def test_flow_and_occlusion_are_those_of_every_layer_evaluated_everywhere(frames):
    made = composer(frames=frames, min_patches=3, max_patches=4)
    _, flow, occluded = made(8, seeded(5))
    layers, goal = nearest_layers(made, 8, 5)
    x, y = torch.arange(made.width), torch.arange(made.height).view(-1, 1)
    assert torch.allclose(flow[:, :, 0] + x, goal[0], atol=1e-3)
    assert torch.allclose(flow[:, :, 1] + y, goal[1], atol=1e-3)
    outside = (goal[0] < 0) | (goal[0] > made.width - 1) | (goal[1] < 0) | (goal[1] > made.height - 1)
    covered = torch.zeros_like(outside)
    shapes, _ = made._draw(8, seeded(5))
    for k in range(1, 5):
        later = shapes.at(k, slice(1, None), ..., None, None)
        over = later.depth(*later.own(*goal.transpose(1, 2))) > 0
        covered |= over.transpose(0, 1) & (layers[:, :-1] < k)
    assert (occluded != (outside | covered)).float().mean() < 1e-4, "but for the rounding at an edge"
    assert 0.02 < covered.float().mean() < 0.4
    assert 0.02 < outside.float().mean() < 0.4


def test_no_part_of_a_patch_is_out_of_its_reach():
    made = composer(min_patches=3, frames=5, max_warp=3.0, max_radius=0.4)
    shapes, _ = made._draw(20, seeded(0))
    x, y = torch.arange(128.0), torch.arange(96.0).view(-1, 1)
    every = shapes.at(slice(1, None), ..., None, None)
    cx, cy = every.place[:2]
    far = torch.hypot(x - cx, y - cy) > every.reach
    assert every.depth(*every.own(x, y))[far].max() < -0.5


# ------------------------------------------------------------------------------------------------- what scenes are like


def test_without_other_motions_each_layer_shifts_as_a_whole_within_the_bound():
    made = composer(max_shift=5.0, max_rotation=0, max_zoom=0, max_warp=0, min_patches=2)
    _, flow, _ = made(20, seeded(0))
    layers, _ = nearest_layers(made, 20, 0)
    for scene, which in zip(flow[:, 0], layers[:, 0], strict=True):
        shifts = [scene[:, which == k] for k in which.unique()]
        assert all((shift - shift[:, :1]).abs().max() < 1e-3 for shift in shifts)
    assert 4 < flow.abs().max() <= 5.001


def test_the_motion_of_a_sequence_is_smooth_in_time():
    """Shifts change from frame to frame by the same, and by no more than a tenth of the bound."""
    made = composer(frames=6, max_rotation=0, max_zoom=0, max_warp=0, max_patches=0, min_patches=0)
    _, flow, _ = made(12, seeded(0))
    change = flow[..., 0, 0].diff(dim=1)
    assert (change - change[:, :1]).abs().max() < 1e-3
    assert 0.4 < change.abs().max() <= 0.8 + 1e-3


def test_how_many_patches_there_are_is_uniform():
    """Tiny ones, so that none hides another, in frames that all of their centres are in."""
    made = composer(min_patches=1, max_patches=3, min_radius=0.02, max_radius=0.02, max_shift=0)
    shapes, _ = made._draw(900, seeded(0))
    there = (shapes.place[0, 1:, 0] < 1e4).sum(0)
    counts = there.bincount(minlength=5)
    assert counts.tolist()[0] == counts.tolist()[4] == 0
    assert (counts[1:4] - 300).abs().max() < 60
    layers, _ = nearest_layers(made, 40, 0)
    shown = [len(set(scene.unique().tolist()) - {0}) for scene in layers[:, 0]]
    assert max(shown) == 3
    assert np.mean(shown) > 1.7


def test_by_default_the_flow_is_as_long_as_the_docstring_says():
    _, _, flow, valid, occluded = everything(SyntheticFlowDataModule().test_dataloader())
    length = flow.norm(dim=1)
    assert length.mean() == pytest.approx(6.11, abs=0.01)
    assert length.max() == pytest.approx(13.2, abs=0.1)
    assert occluded.float().mean() == pytest.approx(0.115, abs=0.001)
    assert valid.all()


def test_every_scene_has_detail():
    first, _, *_ = everything(SyntheticFlowDataModule().test_dataloader())
    assert first.std((1, 2, 3)).min() > 0.05
    assert first.mean((1, 2, 3)).min() > 0.1
    assert first.mean((1, 2, 3)).max() < 0.9


# ------------------------------------------------------------------------------------------- what is fixed and what not


def test_no_pixel_is_in_two_parts():
    photographs = load_sample_images()
    assert {name.rpartition("/")[2] for name in photographs.filenames} == set(BANDS)
    for (top, bottom), columns in BANDS.values():
        assert 0 <= top < bottom <= 1
        edges = [edge for band in columns for edge in band]
        assert edges == sorted(edges)
        assert all(round(640 * left) < round(640 * right) for left, right in columns)
    for n, part in enumerate(photographs_split()):
        for photograph, ((top, bottom), columns) in zip(part, BANDS.values(), strict=True):
            left, right = columns[n]
            expected = (427 * (bottom - top) * 0.6, 640 * (right - left) * 0.6)
            assert photograph.shape[1:] == pytest.approx(expected, abs=1.5)
            assert photograph.min() >= 0
            assert photograph.max() <= 1


def test_a_part_shows_its_own_photographs():
    module = SyntheticFlowDataModule()
    for made, photographs in zip(module.composers, photographs_split(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(made.photographs, photographs, strict=True))
    splits = module.splits
    assert splits.train.composer is module.composers[0]
    for part, made, size, seed in ((splits.val, 1, 64, 1), (splits.test, 2, 128, 2)):
        generator = seeded(seed)
        for first in range(0, size, 16):
            frames, flow, occluded = module.composers[made](16, generator)
            assert torch.equal(part.frames[first : first + 16], frames)
            assert torch.equal(part.flow[first : first + 16], flow)
            assert torch.equal(part.occluded[first : first + 16], occluded)


def test_validation_and_test_scenes_never_change():
    """Published scores refer to these scenes: figures of them, and the same again under another seed."""
    parts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        splits = SyntheticFlowDataModule(val_size=16, test_size=16 + seed).splits
        parts.append((splits.val, splits.test))
    for first, second in zip(*parts, strict=True):
        assert torch.equal(first.frames, second.frames[:16])
        assert torch.equal(first.flow, second.flow[:16])
    for part, expected in zip(
        parts[0], ([-1.5697, 5.0330, 132.395, 0.14596], [-0.1966, 5.0941, 135.592, 0.12086]), strict=True
    ):
        figures = (part.flow.mean(), part.flow.std(), part.frames.float().mean(), part.occluded.float().mean())
        assert [float(figure) for figure in figures] == pytest.approx(expected, rel=1e-3)


@workers
def test_training_scenes_follow_the_seed_and_are_new_in_every_epoch_and_batch(num_workers, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what seed_everything sets is taken back after the test
    monkeypatch.setenv("PL_SEED_WORKERS", "0")

    def two_epochs(seed: int) -> tuple[Tensor, Tensor]:
        seed_everything(seed, workers=True, verbose=False)
        module = SyntheticFlowDataModule(height=16, width=24, train_size=24, num_workers=num_workers, val_size=1)
        loader = module.train_dataloader()
        return everything(loader)[0], everything(loader)[0]

    first, second = two_epochs(1)
    again_first, again_second = two_epochs(1)
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)
    scenes = torch.cat([first, second, two_epochs(2)[0]]).flatten(1)
    assert len(scenes.unique(dim=0)) == len(scenes) == 3 * 24


def test_processes_of_a_distributed_run_draw_different_scenes():
    """They start from one seed, and sample different indices."""
    dataset = NewFlow(composer(), 64)

    def drawn(indices: list[int]) -> Tensor:
        torch.manual_seed(0)
        return torch.stack([sample[0] for sample in dataset.__getitems__(indices)])

    assert torch.equal(drawn([0, 2]), drawn([0, 2]))
    assert not torch.equal(drawn([0, 2]), drawn([1, 3]))


# -------------------------------------------------------------------------------------------------------- the loaders


@settings(max_examples=6, deadline=None)
@given(
    height=st.integers(16, 70),
    width=st.integers(16, 70),
    frames=st.integers(2, 4),
    fewest=st.integers(0, 2),
    more=st.integers(0, 2),
    batch=st.integers(3, 9),
)
def test_batches(height, width, frames, fewest, more, batch):
    module = SyntheticFlowDataModule(
        batch_size=batch,
        height=height,
        width=width,
        frames=frames,
        min_patches=fewest,
        max_patches=fewest + more,
        train_size=10,
        val_size=11,
        test_size=12,
    )
    for part, count in (("train", 10), ("val", 11), ("test", 12), ("predict", 12)):
        batches = list(getattr(module, f"{part}_dataloader")())
        assert [len(entries[0]) for entries in batches] == [batch] * (count // batch) + [count % batch] * (
            count % batch > 0
        )
        for entries in batches:
            B, times = len(entries[0]), (frames - 1,) if frames > 2 else ()
            *images, flow, valid, occluded = entries
            assert len(images) == (1 if frames > 2 else 2)
            for image in images:
                assert image.shape == (B, *((frames,) if frames > 2 else ()), 3, height, width)
                assert image.dtype == torch.float32
                assert 0 <= image.min() < image.max() <= 1
            assert flow.shape == (B, *times, 2, height, width)
            assert flow.dtype == torch.float32
            assert flow.isfinite().all()
            assert valid.shape == occluded.shape == (B, *times, height, width)
            assert valid.dtype == occluded.dtype == torch.bool
            assert valid.all()


def test_a_pair_is_a_sequence_of_two():
    frames, flow, occluded = composer()(3, seeded(0))
    image1, image2, pair_flow, valid, hidden = FlowDataset((frames, flow, occluded))[1]
    assert torch.equal(torch.stack([image1, image2]) * 255, frames[1].float())
    assert torch.equal(pair_flow, flow[1, 0])
    assert torch.equal(hidden, occluded[1, 0])
    assert valid.all()


def test_one_scene_at_a_time_is_a_scene_too():
    sample = SyntheticFlowDataModule(val_size=1, test_size=1).splits.train[3]
    assert [tuple(entry.shape) for entry in sample] == [(3, 96, 128)] * 2 + [(2, 96, 128)] + [(96, 128)] * 2


def test_what_it_says_of_itself():
    module = SyntheticFlowDataModule()
    assert len(module.train_dataloader()) == 1024 // 8
    assert module.eval_batch_size == module.batch_size == 8
    assert not hasattr(module, "num_classes")
    assert set(module.hparams) == {
        *("batch_size", "num_workers", "height", "width", "frames", "min_patches", "max_patches", "max_shift"),
        *("max_rotation", "max_zoom", "max_warp", "train_size", "val_size", "test_size"),
    }


def test_a_set_may_be_evaluated_in_batches_of_another_size():
    class Pairs(FlowDataModule):
        def load(self):
            return Splits(*(FlowDataset(composer(height=16, width=16)(5, seeded(0))) for _ in range(3)))

    module = Pairs(batch_size=4, eval_batch_size=1)
    assert [len(batch[0]) for batch in module.train_dataloader()] == [4, 1]
    for part in ("val", "test", "predict"):
        assert [len(batch[0]) for batch in getattr(module, f"{part}_dataloader")()] == [1] * 5
    with pytest.raises(ValueError, match="eval_batch_size is a whole number, at least 1; given: 0"):
        Pairs(eval_batch_size=0)


def test_a_loader_can_be_sent_to_a_spawned_worker():
    loader = SyntheticFlowDataModule(val_size=1, test_size=1).train_dataloader()
    dataset = pickle.loads(pickle.dumps(loader.dataset))  # noqa: S301
    assert dataset[0][0].shape == (3, 96, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 15}, "height is a whole number, at least 16; given: 15"),
        ({"width": 64.0}, r"width is a whole number, at least 16; given: 64\.0"),
        ({"frames": 1}, "frames is a whole number, at least 2; given: 1"),
        ({"min_patches": -1}, "min_patches is a whole number, at least 0; given: -1"),
        ({"min_patches": 4}, "max_patches is a whole number, at least 4; given: 3"),
        ({"max_shift": -1}, "max_shift is at least 0 and below inf; given: -1"),
        ({"max_zoom": float("nan")}, "max_zoom is at least 0 and below inf; given: nan"),
        ({"train_size": 0}, "train_size is a whole number, at least 1; given: 0"),
        ({"test_size": True}, "test_size is a whole number, at least 1; given: True"),
        ({"batch_size": 0}, "batch_size is a whole number, at least 1; given: 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticFlowDataModule(**arguments)


def test_bad_radii():
    with pytest.raises(ValueError, match=r"max_radius at least min_radius; given: 0\.3 and 0\.24"):
        composer(min_radius=0.3)


def test_the_arguments_are_plain_enough_for_a_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FlowDataModule, "data")
    arguments = ["--data=SyntheticFlowDataModule", "--data.height=48", "--data.val_size=2", "--data.test_size=2"]
    module = parser.instantiate(parser.parse_args(arguments)).data
    assert isinstance(module, SyntheticFlowDataModule)
    assert module.splits.val[0][0].shape == (3, 48, 128)

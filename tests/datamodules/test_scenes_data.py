"""Scenes of digits: what a scene is made of, where the digits go, what stays fixed and what is drawn anew."""

from __future__ import annotations

import hashlib
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from pytorch_lightning import seed_everything
from sklearn.datasets import load_digits
from torch import Generator, Tensor

from datamodules import DigitScenesDataModule, SegmentationDataModule, digits_split
from datamodules.scenes import NewScenes, SceneComposer
from tests.datamodules.loading import everything, workers


def squares(**arguments) -> SceneComposer:
    """A composer whose ten digits are full squares of 8x8, neither turned nor magnified."""
    plain = {"scene_size": 32, "min_digits": 3, "max_digits": 5, "min_scale": 1.0, "max_scale": 1.0, "max_rotation": 0}
    return SceneComposer(torch.full((10, 8, 8), 16.0), torch.arange(10), **{**plain, **arguments})


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------- what a scene is


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_labels_follow_from_the_values(part):
    images, labels = everything(getattr(DigitScenesDataModule(), f"{part}_dataloader")())
    values = (images * 255).round().squeeze(1)
    assert torch.equal(labels == 0, values < 64)
    assert torch.equal(labels == 255, (values >= 64) & (values < 128))
    ink = labels[values >= 128]
    assert set(ink.tolist()) == set(range(1, 11))


def test_a_patch_is_the_turned_and_magnified_digit():
    """The docstring, read pixel by pixel: the same numbers exactly."""
    composer = DigitScenesDataModule(min_scale=1.0, max_scale=1.5, max_rotation=30.0).composers[0]
    which = torch.tensor([3, 14, 15])
    patches = composer._patches(which, seeded(0)).numpy()
    u, v = torch.rand(2, 3, dtype=torch.float64, generator=seeded(0)).numpy()
    P = composer.patch_size
    assert patches.shape == (3, 14, 14) == (3, P, P)
    for n, (i, j) in itertools.product(range(3), itertools.product(range(P), range(P))):
        angle, scale = np.radians(30 * (2 * u[n] - 1)), 1 + 0.5 * v[n]
        A = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
        x, y = np.round(A * 1024) / 1024 @ [j - (P - 1) / 2, i - (P - 1) / 2] + 3.5
        weights = np.clip(1 - abs(y - np.arange(8)), 0, None)[:, None] * np.clip(1 - abs(x - np.arange(8)), 0, None)
        assert patches[n, i, j] == np.round((weights * composer.digits[which[n]].numpy()).sum() * 255 / 16)


def test_how_many_digits_a_scene_has_is_uniform():
    images, _ = squares(scene_size=64, min_digits=2, max_digits=4)(900, seeded(0))
    number = (images > 0).flatten(1).sum(1) / 64
    assert torch.equal(number, number.round()), "there is room for all, so none covers another"
    counts = number.long().bincount(minlength=5)
    assert counts.sum() == counts[2:].sum()
    assert (counts[2:] - 300).abs().max() < 60


def test_each_digit_is_whole_and_its_label_is_its_class_plus_one():
    composer = squares(scene_size=48)
    images, labels = composer(200, seeded(0))
    assert torch.equal(images.squeeze(1) == 255, labels > 0)
    for c in range(11):
        area = (labels == c).flatten(1).sum(1)
        assert torch.equal(area % 64, torch.zeros(200, dtype=torch.int64))
    share = labels.long().flatten().bincount(minlength=11)[1:].double()
    assert (share / share.mean() - 1).abs().max() < 0.4, "all classes are drawn equally often"


def test_a_place_is_uniform_among_all_where_the_digit_is_inside():
    images, _ = squares(scene_size=10, min_digits=1, max_digits=1)(1800, seeded(0))
    assert torch.equal((images > 0).flatten(1).sum(1), torch.full((1800,), 64))
    top = (images > 0).any(-1).float().squeeze(1).argmax(1)
    left = (images > 0).any(-2).float().squeeze(1).argmax(1)
    counts = (3 * top + left).bincount(minlength=9)
    assert len(counts) == 9
    assert (counts - 200).abs().max() < 60


def test_without_room_digits_overlap_as_little_as_they_can_and_the_later_is_on_top():
    """Two squares of 8 in a scene of 10: the first may stand in a corner, at an edge, or in the middle."""
    _, labels = squares(scene_size=10, min_digits=2, max_digits=2)(400, seeded(0))
    hidden = set()
    for label in labels:
        areas = label.flatten().long().bincount()[1:]
        areas = areas[areas > 0]
        if len(areas) == 2:
            assert areas.max() == 64, "the later one is not covered"
            hidden.add(64 - int(areas.min()))
    assert hidden == {6 * 6, 6 * 7, 7 * 7}


def test_digits_of_the_real_set_rarely_overlap():
    """By default: where the ink is more than in the fewest possible digits, it is all there."""
    composer = DigitScenesDataModule(min_scale=1.0, max_scale=1.0, max_rotation=0.0, min_digits=4, max_digits=4)
    images, _ = composer.composers[0](300, seeded(0))
    generator = seeded(0)
    torch.randint(4, 5, (300, 1), generator=generator)
    which = torch.randint(1257, (300, 4), generator=generator)
    expected = (composer.composers[0].digits[which] > 0).sum((1, 2, 3))
    assert ((images > 0).sum((1, 2, 3)) == expected).float().mean() > 0.98


def boxes(images: Tensor) -> list[bytes]:
    """Each image's ink, cut out: its height, width and values."""
    cut = []
    for image in images.long():
        rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        part = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        cut.append(bytes([*part.shape, *part.flatten().tolist()]))
    return cut


def test_no_digit_is_in_scenes_of_two_parts():
    """Scenes of one digit as it is, so that each can be told."""
    module = DigitScenesDataModule(
        min_digits=1, max_digits=1, min_scale=1, max_scale=1, max_rotation=0, val_size=400, test_size=400
    )
    everyone = load_digits().images
    parts = [
        set(boxes((torch.from_numpy(everyone[part]) * 255 / 16).round().to(torch.uint8))) for part in digits_split()
    ]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    for name, own in zip(("train", "val", "test"), parts, strict=True):
        images, _ = everything(getattr(module, f"{name}_dataloader")())
        shown = set(boxes((images * 255).round().to(torch.uint8).squeeze(1)))
        assert shown <= own
        assert len(shown) > 100


# ------------------------------------------------------------------------------------------- what is fixed and what not


def test_validation_and_test_scenes_never_change():
    """On any machine: published scores refer to these scenes."""
    digests = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        splits = DigitScenesDataModule().splits
        digests.append(
            [
                hashlib.sha256(part.images.numpy().tobytes() + part.labels.numpy().tobytes()).hexdigest()[:16]
                for part in (splits.val, splits.test)
            ]
        )
    assert digests[0] == digests[1] == ["49b849739720a74f", "3422d25f9247d807"]


@workers
def test_evaluation_loaders_give_the_same_scenes_in_the_same_order(num_workers):
    module = DigitScenesDataModule(num_workers=num_workers)
    for part, size in (("val", 128), ("test", 256), ("predict", 256)):
        first, second = (everything(getattr(module, f"{part}_dataloader")()) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert first[0].shape == (size, 1, 32, 32)


@workers
def test_training_scenes_follow_the_seed_and_are_new_in_every_epoch_and_batch(num_workers, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what seed_everything sets is taken back after the test
    monkeypatch.setenv("PL_SEED_WORKERS", "0")

    def two_epochs(seed: int) -> tuple[Tensor, Tensor]:
        seed_everything(seed, workers=True, verbose=False)
        loader = DigitScenesDataModule(train_size=96, num_workers=num_workers).train_dataloader()
        return everything(loader)[0], everything(loader)[0]

    first, second = two_epochs(1)
    again_first, again_second = two_epochs(1)
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)
    scenes = torch.cat([first, second, two_epochs(2)[0]]).flatten(1)
    assert len(scenes.unique(dim=0)) == len(scenes) == 3 * 96


def test_processes_of_a_distributed_run_draw_different_scenes():
    """They start from one seed, and sample different indices."""
    dataset = NewScenes(squares(), 64)

    def drawn(indices: list[int]) -> Tensor:
        torch.manual_seed(0)
        return torch.stack([image for image, _ in dataset.__getitems__(indices)])

    assert torch.equal(drawn([0, 2]), drawn([0, 2]))
    assert not torch.equal(drawn([0, 2]), drawn([1, 3]))


# -------------------------------------------------------------------------------------------------------- the loaders


@settings(max_examples=6, deadline=None)
@given(
    size=st.integers(18, 50),
    fewest=st.integers(1, 4),
    more=st.integers(0, 3),
    scale=st.floats(1, 2),
    rotation=st.floats(0, 180),
    batch=st.integers(3, 9),
)
def test_batches(size, fewest, more, scale, rotation, batch):
    module = DigitScenesDataModule(
        batch_size=batch,
        scene_size=size,
        min_digits=fewest,
        max_digits=fewest + more,
        max_scale=scale,
        max_rotation=rotation,
        train_size=10,
        val_size=11,
        test_size=12,
    )
    assert module.image_shape == (1, size, size)
    for part, count in (("train", 10), ("val", 11), ("test", 12)):
        batches = list(getattr(module, f"{part}_dataloader")())
        assert [len(labels) for _, labels in batches] == [batch] * (count // batch) + [count % batch] * (
            count % batch > 0
        )
        for images, labels in batches:
            assert images.shape == (len(labels), 1, size, size)
            assert labels.shape == (len(labels), size, size)
            assert images.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert images.min() >= 0
            assert 0.5 < images.max() <= 1
            assert set(labels.unique().tolist()) <= {*range(module.num_classes), module.ignore_index}


def test_one_scene_at_a_time_is_a_scene_too():
    image, labels = DigitScenesDataModule().splits.train[3]
    assert image.shape == (1, 32, 32)
    assert labels.shape == (32, 32)
    assert labels.max() > 0


def test_what_it_says_of_itself():
    module = DigitScenesDataModule()
    assert module.num_classes == 11
    assert module.class_names == ("background", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert module.ignore_index == 255
    assert len(module.train_dataloader()) == 1024 // 32
    assert set(module.hparams) == {
        *("batch_size", "num_workers", "scene_size", "min_digits", "max_digits", "min_scale", "max_scale"),
        *("max_rotation", "train_size", "val_size", "test_size"),
    }


def test_a_loader_can_be_sent_to_a_spawned_worker():
    dataset = pickle.loads(pickle.dumps(DigitScenesDataModule().train_dataloader().dataset))  # noqa: S301
    assert dataset[0][0].shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_digits": 0}, "min_digits is a whole number, at least 1; given: 0"),
        ({"max_digits": 2}, "max_digits is a whole number, at least 3; given: 2"),
        ({"min_scale": 0.5}, r"min_scale is at least 1 and max_scale at least min_scale; given: 0\.5 and 1\.5"),
        ({"max_scale": float("nan")}, "min_scale is at least 1 and max_scale at least min_scale; given: 1.0 and nan"),
        ({"max_rotation": -1}, "max_rotation is at least 0 and below inf; given: -1"),
        ({"scene_size": 13}, r"scene_size=13 has no room for a digit of max_scale=1\.5: it takes 14 pixels"),
        ({"scene_size": 32.0}, r"scene_size is a whole number, at least 1; given: 32\.0"),
        ({"train_size": 0}, "train_size is a whole number, at least 1; given: 0"),
        ({"test_size": True}, "test_size is a whole number, at least 1; given: True"),
        ({"batch_size": 0}, "batch_size is a whole number, at least 1; given: 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitScenesDataModule(**arguments)


def test_the_arguments_are_plain_enough_for_a_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationDataModule, "data")
    module = parser.instantiate(parser.parse_args(["--data=DigitScenesDataModule", "--data.scene_size=48"])).data
    assert isinstance(module, DigitScenesDataModule)
    assert module.splits.val[0][0].shape == (1, 48, 48)

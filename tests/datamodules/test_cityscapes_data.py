"""Cityscapes, on a small tree laid out like the real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torchvision import tv_tensors

from datamodules import CityscapesDataModule, DataError, SegmentationDataModule
from datamodules.cityscapes import ScaleCropFlip
from tests.datamodules.loading import everything, workers

# The 19 classes by their number in the files, as Cordts et al. number them.
NUMBERS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
H, W = 32, 64
NAMES = {
    "train": ("aachen/aachen_000001_000019", "aachen/aachen_000000_000019", "zurich/zurich_000000_000019"),
    "val": ("munster/munster_000001_000019", "lindau/lindau_000000_000019"),
}


def paths(root: Path, part: str, name: str) -> tuple[Path, Path]:
    """Where an image and its labels are."""
    return (
        root / "leftImg8bit" / part / f"{name}_leftImg8bit.png",
        root / "gtFine" / part / f"{name}_gtFine_labelIds.png",
    )


def write(root: Path, part: str, name: str, image: np.ndarray, numbers: np.ndarray) -> None:
    for path, values in zip(paths(root, part, name), (image, numbers), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    """Images of noise with labels of noise, all numbers from 0 to 33."""
    rng = np.random.default_rng(0)
    for part, names in NAMES.items():
        for name in names:
            image = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
            write(tmp_path, part, name, image, rng.integers(0, 34, (H, W), dtype=np.uint8))
    return tmp_path


def small(root: Path, **arguments) -> CityscapesDataModule:
    plain = {"crop_height": 16, "crop_width": 32, "batch_size": 2, "num_workers": 0}
    return CityscapesDataModule(root=str(root), **{**plain, **arguments})


@workers
def test_evaluation_gives_whole_images_in_the_order_of_their_names(num_workers, cityscapes):
    module = small(cityscapes, num_workers=num_workers)
    images, labels = everything(module.val_dataloader())
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert type(images) is type(labels) is torch.Tensor
    for image, label, name in zip(images, labels, sorted(NAMES["val"]), strict=True):
        colours, numbers = (np.asarray(Image.open(path)) for path in paths(cityscapes, "val", name))
        np.testing.assert_allclose(image, colours.transpose(2, 0, 1).astype(np.float32) / 255, rtol=1e-6)
        expected = [[NUMBERS.index(n) if n in NUMBERS else 255 for n in row] for row in numbers]
        np.testing.assert_array_equal(label, expected)
    for loader in (module.test_dataloader(), module.predict_dataloader()):
        assert torch.equal(everything(loader)[1], labels), "the test images are the validation images"


@workers
def test_training_images_follow_the_seed_and_are_new_in_every_epoch(num_workers, cityscapes):
    def two_epochs() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        loader = small(cityscapes, num_workers=num_workers).train_dataloader()
        return everything(loader)[0], everything(loader)[0]

    first, second = two_epochs()
    assert first.shape == (3, 3, 16, 32)
    again_first, again_second = two_epochs()
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)
    images = torch.cat([first, second]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 6


def test_images_and_labels_stay_aligned(tmp_path):
    """Two colours for two classes: wherever a colour is pure, the label is its own; on black it is ignored."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 2, (4, 8)).repeat(8, 0).repeat(8, 1)
    image = np.where(blocks, 250, 50).astype(np.uint8)[:, :, None].repeat(3, 2)
    for part, names in NAMES.items():
        for name in names:
            write(tmp_path, part, name, image, np.where(blocks, 11, 7).astype(np.uint8))
    torch.manual_seed(0)
    dataset = small(tmp_path, crop_height=24, crop_width=48).splits.train
    pure = 0.0
    for _ in range(30):
        image, labels = dataset[0]
        assert image.shape == (3, 24, 48)
        assert labels.shape == (24, 48)
        values = (image[0] * 255).round()
        assert set(labels[values == 250].tolist()) <= {2}
        assert set(labels[values == 50].tolist()) <= {0}
        assert torch.equal(labels == 255, values == 0)
        pure += float(((values == 0) | (values == 50) | (values == 250)).float().mean()) / 30
    assert pure > 0.7


def test_scales_places_and_mirror_images_are_the_published_ones():
    """In a window larger than any scaled image all of it is seen."""
    torch.manual_seed(0)
    ramp = torch.arange(1, 41, dtype=torch.uint8).expand(3, 20, 40)
    image, labels = tv_tensors.Image(ramp), tv_tensors.Mask(torch.zeros(20, 40, dtype=torch.uint8))
    augmentation = ScaleCropFlip(50, 90)
    sizes, corners, mirrored = [], set(), 0
    for _ in range(600):
        given, marks = augmentation(image, labels)
        seen = marks == 0
        rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
        assert int(seen.sum()) == len(rows) * len(columns)
        assert int(given[:, ~seen].sum()) == 0
        sizes.append((len(rows), len(columns)))
        corners.add((int(rows[0]), int(columns[0])))
        row = given[0, rows[0], columns].int()
        mirrored += int(row[0] > row[-1])
    assert set(sizes) == {(2 * t, 4 * t) for t in range(5, 22)}, "0.5, 0.6, ... 2.1"
    assert max(sizes.count(size) for size in set(sizes)) < 70, "all about equally often"
    assert 240 < mirrored < 360
    assert len(corners) > 300


def test_what_it_says_of_itself():
    module = CityscapesDataModule()
    assert module.num_classes == len(module.class_weights) == 19
    assert module.ignore_index == 255
    assert module.class_names[:3] == ("road", "sidewalk", "building")
    assert module.class_names[-3:] == ("train", "motorcycle", "bicycle")
    assert sum(module.class_weights) == pytest.approx(19, abs=0.05), "as published: about one on average"
    assert (module.class_weights[0], module.class_weights[17]) == (0.8373, 1.1529)


def test_the_arguments_are_plain_enough_for_a_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationDataModule, "data")
    module = parser.instantiate(parser.parse_args(["--data=CityscapesDataModule", "--data.crop_height=768"])).data
    assert isinstance(module, CityscapesDataModule)
    assert (module.crop_height, module.crop_width) == (768, 1024)


# ------------------------------------------------------------------------------------------- what is missing or broken


@pytest.mark.parametrize("folder", ["leftImg8bit", "gtFine/val"])
def test_a_missing_folder_is_one_clear_error(folder, cityscapes):
    (cityscapes / folder).rename(cityscapes / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"^Cityscapes was not found: there is no") as caught:
        small(cityscapes).setup("fit")
    text = str(caught.value)
    assert f"{cityscapes}/gtFine/{{train,val}}/<city>/*_gtFine_labelIds.png" in text
    assert "leftImg8bit_trainvaltest.zip" in text
    assert "--data.root" in text


def test_missing_labels_are_named(cityscapes):
    _, path = paths(cityscapes, "train", NAMES["train"][2])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 3 label files are missing: {path}"):
        small(cityscapes).setup("fit")


def test_no_images_at_all(cityscapes):
    for path in (cityscapes / "leftImg8bit" / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="there are no images in"):
        small(cityscapes).setup("fit")


@workers
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_file_is_named(which, num_workers, cityscapes):
    path = paths(cityscapes, "val", NAMES["val"][0])[which]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="is corrupt: it does not open as an image") as caught:
        list(small(cityscapes, num_workers=num_workers).val_dataloader())
    assert str(path) in str(caught.value)


def test_labels_of_another_size_are_named(cityscapes):
    _, path = paths(cityscapes, "val", NAMES["val"][0])
    Image.fromarray(np.zeros((H, W + 1), np.uint8)).save(path)
    with pytest.raises(
        DataError, match=r"it holds labels \(1, 32, 65\) of torch.uint8; expected: \(1, 32, 64\)"
    ) as caught:
        list(small(cityscapes).val_dataloader())
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("name", ["crop_height", "crop_width", "batch_size"])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"{name} is a whole number, at least 1; given: 0"):
        CityscapesDataModule(**{name: 0})

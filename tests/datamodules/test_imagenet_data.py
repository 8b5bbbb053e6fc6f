"""ImageNet, on a small tree of folders laid out like the real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules import DataError, ImageDataModule, ImageNetDataModule
from tests.datamodules.loading import everything, workers

CLASSES = ("n01440764", "n01443537", "n02102040")


def write_image(path: Path, values: np.ndarray) -> None:
    """Losslessly, under the name of a photograph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, format="PNG")


@pytest.fixture
def imagenet(tmp_path) -> Path:
    """Training images of one colour each, ``20 * class + image``; validation images 8 high and 12 wide, of noise."""
    rng = np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        for k in range(4):
            write_image(tmp_path / "train" / name / f"{name}_{k}.JPEG", np.full((9, 7 + k, 3), 20 * c + k, np.uint8))
        for k in range(2):
            values = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
            write_image(tmp_path / "val" / name / f"ILSVRC2012_val_{2 * c + k:08}.JPEG", values)
    return tmp_path


def small(root: Path, **arguments) -> ImageNetDataModule:
    return ImageNetDataModule(
        root=str(root), image_size=6, resize=8, **{"batch_size": 5, "num_workers": 0, **arguments}
    )


@workers
def test_training_images_have_the_label_of_their_folder(num_workers, imagenet):
    module = small(imagenet, num_workers=num_workers)
    module.prepare_data()
    images, labels = everything(module.train_dataloader())
    assert images.shape == (12, 3, 6, 6)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    colours = (images * 255).round().long()
    assert torch.equal(colours.amin((1, 2, 3)), colours.amax((1, 2, 3))), "a part of one colour has that colour"
    assert torch.equal(colours[:, 0, 0, 0] // 20, labels)
    assert len(colours[:, 0, 0, 0].unique()) == 12, "each image once"


def test_evaluation_shows_the_centre_of_the_resized_image(imagenet):
    """The shorter side has 8 pixels already, so that the values are those of the file."""
    module = small(imagenet)
    images, labels = everything(module.val_dataloader())
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    for image, path in zip(images, sorted((imagenet / "val").rglob("*.JPEG")), strict=True):
        expected = np.asarray(Image.open(path))[1:7, 3:9].transpose(2, 0, 1).astype(np.float32) / 255
        np.testing.assert_allclose(image, expected, rtol=1e-6)
    for loader in (module.test_dataloader(), module.predict_dataloader()):
        assert torch.equal(everything(loader)[0], images), "the test images are the validation images"


def test_an_image_of_another_size_is_resized_first(imagenet):
    path = imagenet / "val" / CLASSES[0] / "ILSVRC2012_val_00000000.JPEG"
    half = np.zeros((32, 64, 3), np.uint8)
    half[:, 32:] = 200
    write_image(path, half)
    image, _ = small(imagenet).splits.val[0]
    assert image.shape == (3, 6, 6)
    np.testing.assert_allclose(image[:, :, 0] * 255, 0, atol=1)
    np.testing.assert_allclose(image[:, :, -1] * 255, 200, atol=1)


def test_training_images_are_cut_at_random_and_mirrored(imagenet):
    """A ramp from left to right is shown in parts of it, half of them mirrored."""
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (60, 60, 3))
    write_image(imagenet / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG", ramp)
    torch.manual_seed(0)
    dataset = small(imagenet).splits.train
    shown = torch.stack([dataset[0][0] for _ in range(200)]) * 255
    rise = shown[:, 0, 3, 5] - shown[:, 0, 3, 0]
    assert 60 < int((rise < 0).sum()) < 140
    assert rise.abs().min() < 70, "a small part"
    assert rise.abs().max() > 150, "nearly all"


@workers
def test_the_augmentation_follows_the_seed_and_is_new_in_every_epoch(num_workers, imagenet):
    rng = np.random.default_rng(1)
    for path in (imagenet / "train").rglob("*.JPEG"):
        write_image(path, rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))

    def two_epochs() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        loader = small(imagenet, num_workers=num_workers).train_dataloader()
        return everything(loader)[0], everything(loader)[0]

    first, second = two_epochs()
    again_first, again_second = two_epochs()
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)
    images = torch.cat([first, second]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 24


def test_what_it_says_of_itself(imagenet):
    module = small(imagenet)
    assert module.class_names == CLASSES
    assert module.num_classes == 3
    assert module.image_shape == (3, 6, 6)
    assert ImageNetDataModule().image_shape == (3, 224, 224)


def test_the_arguments_are_plain_enough_for_a_command_line(imagenet):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    module = parser.instantiate(parser.parse_args(["--data=ImageNetDataModule", f"--data.root={imagenet}"])).data
    assert isinstance(module, ImageNetDataModule)
    assert module.num_classes == 3


# ------------------------------------------------------------------------------------------- what is missing or broken


def test_a_missing_set_is_one_clear_error(tmp_path):
    module = ImageNetDataModule(root=str(tmp_path / "nowhere"))
    for step in (module.prepare_data, module.setup, lambda: module.num_classes):
        with pytest.raises(FileNotFoundError, match=r"^no images were found: there is no folder") as caught:
            step()
        text = str(caught.value)
        assert f"{tmp_path}/nowhere/train" in text
        assert f"{tmp_path}/nowhere/val/<class>/*.JPEG" in text
        assert "--data.root" in text


def test_validation_images_in_a_single_folder_are_explained(imagenet):
    for path in list((imagenet / "val").rglob("*.JPEG")):
        path.rename(imagenet / "val" / path.name)
    for folder in list((imagenet / "val").glob("n*")):
        folder.rmdir()
    with pytest.raises(FileNotFoundError, match="published in a single folder and have to be sorted into classes"):
        small(imagenet).prepare_data()


def test_a_class_without_images_is_named(imagenet):
    for path in (imagenet / "train" / CLASSES[1]).iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(FileNotFoundError, match=f"classes without images in .*train: .*{CLASSES[1]}"):
        small(imagenet).setup("fit")


def test_folders_with_other_classes_are_named(imagenet):
    (imagenet / "val" / CLASSES[2]).rename(imagenet / "val" / "n99")
    with pytest.raises(DataError, match=f"only train has 1: {CLASSES[2]}; only val has 1: n99") as caught:
        small(imagenet).prepare_data()
    assert str(imagenet) in str(caught.value)


@workers
@pytest.mark.parametrize("content", [b"no image", b""])
def test_a_damaged_image_is_named(content, num_workers, imagenet):
    path = imagenet / "val" / CLASSES[1] / "ILSVRC2012_val_00000003.JPEG"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is corrupt: it does not open as an image") as caught:
        list(small(imagenet, num_workers=num_workers).val_dataloader())
    assert str(path) in str(caught.value)


def test_an_image_cut_short_is_named(imagenet):
    path = imagenet / "val" / CLASSES[1] / "ILSVRC2012_val_00000003.JPEG"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="it does not open as an image"):
        list(small(imagenet).val_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size is a whole number, at least 1; given: 0"),
        ({"image_size": 300}, "resize is a whole number, at least 300; given: 256"),
        ({"batch_size": 0}, "batch_size is a whole number, at least 1; given: 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageNetDataModule(**arguments)

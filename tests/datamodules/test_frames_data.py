"""Frames of one's own: which files, in which order, as which pairs, and what is refused."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image
from pytorch_lightning import LightningDataModule, LightningModule, Trainer

from datamodules import DataError, FramesDataModule
from datamodules.frames import natural_order
from tests.datamodules.loading import workers


def saved(file: Path, value: int = 0, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Path:
    """An image of one grey value."""
    Image.new("L", size, value).convert(mode).save(file)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five frames, frame_1 to frame_11, made in no order, in five formats; the grey value is 10 times the number."""
    for number, ending in ((10, "png"), (2, "BMP"), (1, "ppm"), (11, "webp"), (3, "tif")):
        saved(tmp_path / f"frame_{number}.{ending}", 10 * number)
    (tmp_path / "notes.txt").write_text("not a frame")
    saved(tmp_path / ".hidden.png")
    return tmp_path


@workers
def test_a_folder_gives_consecutive_pairs_in_natural_order(folder, num_workers):
    module = FramesDataModule(str(folder), num_workers=num_workers)
    module.setup("predict")
    pairs = list(module.predict_dataloader())
    assert module.names == ["frame_1", "frame_2", "frame_3", "frame_10"]
    assert module.in_order
    for (first, second), number, following in zip(pairs, (1, 2, 3, 10), (2, 3, 10, 11), strict=True):
        for image, expected in ((first, number), (second, following)):
            assert image.shape == (1, 3, 16, 20)
            assert image.dtype == torch.float32
            assert (image * 255 - 10 * expected).abs().max() < 3, "webp is not exact"
    for (_, second), (first, _) in itertools.pairwise(pairs):
        assert torch.equal(first, second), "each pair begins where the one before it ended"


@given(st.lists(st.integers(0, 2000), min_size=2, max_size=20, unique=True), st.randoms(use_true_random=False))
def test_numbers_in_names_are_in_their_order(numbers, shuffler: random.Random):
    names = [f"a{number % 3}-{number}.png" for number in numbers]
    shuffler.shuffle(names)
    found = [tuple(map(int, name[1:-4].split("-"))) for name in sorted(names, key=natural_order)]
    assert found == sorted(found)


def test_names_that_only_differ_in_zeros_or_case_have_an_order():
    names = ["B2.png", "b02.png", "a1.png", "10.png", "9.png"]
    assert sorted(names, key=natural_order) == ["9.png", "10.png", "a1.png", "B2.png", "b02.png"]


def test_a_pattern_chooses_among_files(folder):
    saved(folder / "right_1.png")
    assert FramesDataModule(str(folder), pattern="frame_?.*").names == ["frame_1", "frame_2"]


def test_images_come_in_the_order_given(tmp_path):
    files = [str(saved(tmp_path / f"{name}.png", value)) for name, value in (("b", 40), ("a", 80), ("c", 120))]
    module = FramesDataModule(images=files)
    assert module.names == ["b", "a"]
    values = [[round(float(image.mean() * 255)) for image in pair] for pair in module.predict_dataloader()]
    assert values == [[40, 80], [80, 120]]


def test_names_that_are_alike_are_numbered(tmp_path):
    (tmp_path / "other").mkdir()
    files = [str(saved(place / "x.png")) for place in (tmp_path, tmp_path / "other")]
    assert FramesDataModule(images=[*files, files[0]]).names == ["0_x", "1_x"]


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA"])
def test_other_kinds_of_images_become_rgb(tmp_path, mode):
    saved(tmp_path / "1.png", 255, mode=mode)
    saved(tmp_path / "2.png", 0)
    ((first, second),) = FramesDataModule(str(tmp_path)).predict_dataloader()
    assert torch.equal(first, torch.ones(1, 3, 16, 20))
    assert torch.equal(second, torch.zeros(1, 3, 16, 20))


def test_colours_keep_their_place(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    for number in (1, 2):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    image, _ = FramesDataModule(str(tmp_path)).predict_dataloader().dataset[0]
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("arguments", [{}, {"root": "x", "images": ["a.png", "b.png"]}])
def test_a_folder_or_images_are_given(arguments):
    with pytest.raises(ValueError, match=r"a folder, root \(--data.root\), or a list .*not both; given: root='"):
        FramesDataModule(**arguments)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to take frames from"):
        FramesDataModule(str(tmp_path / "nowhere")).setup("predict")


def test_fewer_than_two_images(tmp_path):
    module = FramesDataModule(str(tmp_path))
    with pytest.raises(DataError, match=r"takes two images or more; found: none\. In .* there is: nothing"):
        module.setup("predict")
    saved(tmp_path / "a.png")
    (tmp_path / "b.mp4").touch()
    with pytest.raises(DataError, match=r"found: \S*a\.png\. In .*pattern is '\*', there is: a\.png, b\.mp4"):
        module.setup("predict")
    with pytest.raises(DataError, match=r"takes two images or more; found: one\.png$"):
        FramesDataModule(images=["one.png"]).setup("predict")


def test_an_image_that_is_not_there(tmp_path):
    module = FramesDataModule(images=[str(saved(tmp_path / "a.png")), str(tmp_path / "b.png")])
    with pytest.raises(FileNotFoundError, match=r"there is no image \S*b\.png"):
        module.setup("predict")


def test_an_image_that_does_not_open(tmp_path):
    saved(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2\.png does not open as an image"):
        FramesDataModule(str(tmp_path)).setup("predict")


def test_an_image_that_is_cut_off(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for number in (1, 2):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    content = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(content[: len(content) // 2])
    module = FramesDataModule(str(tmp_path))
    with pytest.raises(DataError, match=r"2\.png is corrupt"):
        list(module.predict_dataloader())


def test_a_header_that_is_cut_off(tmp_path):
    for number in (1, 2):
        saved(tmp_path / f"{number}.ppm")
    module = FramesDataModule(str(tmp_path))
    module.setup("predict")
    (tmp_path / "2.ppm").write_bytes(b"P6\n20 ")
    with pytest.raises(DataError, match=r"2\.ppm is corrupt"):
        list(module.predict_dataloader())


def test_more_than_eight_bits(tmp_path):
    saved(tmp_path / "1.png")
    Image.fromarray(np.full((16, 20), 30000, dtype=np.uint16)).save(tmp_path / "2.png")
    with pytest.raises(DataError, match=r"2\.png has grey values of more than 8 bits .*'I;16'"):
        FramesDataModule(str(tmp_path)).setup("predict")


def test_neighbours_of_different_size(tmp_path):
    saved(tmp_path / "1.png")
    saved(tmp_path / "2.png", size=(20, 17))
    with pytest.raises(DataError, match=r"1\.png is 20x16, \S*2\.png is 20x17"):
        FramesDataModule(str(tmp_path)).setup("predict")


class Model(LightningModule):
    """Anything that a Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        return self.weight

    def validation_step(self, batch, index):
        return None

    def test_step(self, batch, index):
        return None

    def predict_step(self, batch, index):
        return torch.stack([image.mean() for image in batch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_trainer_predicts_with_it_and_does_nothing_else(folder):
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    predictions = trainer.predict(Model(), datamodule=FramesDataModule(str(folder)))
    assert len(predictions) == 4
    for verb in (trainer.fit, trainer.validate, trainer.test):
        with pytest.raises(ValueError, match=r"no ground truth to train on or to test with: it is for predict"):
            verb(Model(), datamodule=FramesDataModule(str(folder)))
    for part in ("train", "val", "test"):
        with pytest.raises(ValueError, match=r"no ground truth to train on or to test with: it is for predict"):
            getattr(FramesDataModule(str(folder)), f"{part}_dataloader")()


def test_the_arguments_are_plain_enough_for_a_command_line(folder):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    files = sorted(str(file) for file in folder.glob("frame_1*"))
    for typed in (f"--data.root={folder}", f"--data.images={files}"):
        module = parser.instantiate(parser.parse_args(["--data=FramesDataModule", typed])).data
        assert len(module.names) >= 2
    assert dict(module.hparams) == {"root": "", "images": files, "pattern": "*", "num_workers": 0}

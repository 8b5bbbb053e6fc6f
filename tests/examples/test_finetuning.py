"""The recipes of fine-tuning: on what is here, on folders of one's own, and on folders that do not fit."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from lightning_modules.flow_files import write_flo, write_kitti
from tests.command_line import ROOT

Run = Callable[..., tuple[float, float]]
RECIPES = ("classifier", "segmenter", "language_model", "flow")

pytestmark = pytest.mark.filterwarnings("ignore")  # of scripts, in which Lightning warns of what is as it should be


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a recipe in this process and in an empty folder; the two figures that it prints last."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args: object, **constants: object) -> tuple[float, float]:
        spec: Any = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"finetune_{name}.py")
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        for constant, value in constants.items():
            assert hasattr(recipe, constant)
            setattr(recipe, constant, value)
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        recipe.main()
        last = capsys.readouterr().out.splitlines()[-1]
        before, after = re.findall(r": ([\d.]+), now ([\d.]+)", last)[0]
        written = zoo.load_pretrained(f"finetuned_{name}.safetensors")
        assert zoo.spec_of(written).model == recipe.MODEL
        return float(before), float(after)

    return run


def draw(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_says_how_it_is_run(name: str) -> None:
    text = (ROOT / "examples" / f"finetune_{name}.py").read_text()
    assert len(text.splitlines()) <= 120
    assert f"python examples/finetune_{name}.py [FOLDER]" in text


@pytest.mark.parametrize("name", RECIPES)
def test_a_folder_that_is_not_there(name: str, run: Run, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(SystemExit, match=rf"^error: (?s:.)*{folder.name}"):
            run(name, folder)


# --------------------------------------------------------------------------------------------------------- classifier


def test_digits_in_five_classes(run: Run) -> None:
    before, after = run("classifier", "--epochs", 3)
    assert before < 0.5
    assert after > 0.75


def test_a_folder_of_images(run: Run, tmp_path: Path) -> None:
    """Of any size and colour: dark ones and bright ones."""
    for i in range(10):
        draw(tmp_path / "images" / "dark" / f"{i}.png", noise(9 + i, 12, 3) // 4)
        draw(tmp_path / "images" / "bright" / f"{i}.jpg", 192 + noise(8, 9 + i) // 4)
    _, after = run("classifier", tmp_path / "images", "--epochs", 8, SIZE=8)
    assert after == 1


# ---------------------------------------------------------------------------------------------------------- segmenter


def test_a_folder_of_images_and_masks(run: Run, tmp_path: Path) -> None:
    for i in range(6):
        mask = np.zeros((20, 16))
        mask[4 : 8 + i, 4:12] = 1
        mask[0] = 255
        draw(tmp_path / "masks" / f"{i}.png", mask)
        draw(tmp_path / "images" / f"{i}.jpg", 200 * (mask == 1) + noise(20, 16) // 8)
    before, after = run("segmenter", tmp_path, "--epochs", 15, SIZE=16)
    assert after > max(before, 0.6)


def test_an_image_without_a_mask(run: Run, tmp_path: Path) -> None:
    for i in range(6):
        draw(tmp_path / "images" / f"{i}.png", noise(8, 8))
    with pytest.raises(SystemExit, match=r"FOLDER has images/NAME.jpg .* with 6 images; missing: .*0.png"):
        run("segmenter", tmp_path)


# ------------------------------------------------------------------------------------------------------ language model


def test_a_folder_of_texts(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("abracadabra " * 800)
    before, after = run("language_model", tmp_path, "--pattern", "*.md", "--steps", 6)
    assert after < 0.9 * before


# --------------------------------------------------------------------------------------------------------------- flow


@pytest.mark.parametrize("write", [write_flo, write_kitti])
def test_a_folder_of_pairs(write: Callable[[Path, torch.Tensor], None], run: Run, tmp_path: Path) -> None:
    """All that is in them is 3 pixels to the left of where it was, and images differ in size."""
    for i in range(5):
        scene = np.kron(noise(10, 14, 3), np.ones((4 + i % 2, 4, 1)))
        draw(tmp_path / f"{i}_img1.png", scene[:, :-3])
        draw(tmp_path / f"{i}_img2.png", scene[:, 3:])
        flow = torch.tensor([-3.0, 0.0]).view(2, 1, 1).expand(2, *scene[:, 3:].shape[:2])
        write(tmp_path / f"{i}_flow{'.flo' if write is write_flo else '.png'}", flow)
    before, after = run("flow", tmp_path, "--steps", 2, HEIGHT=32, WIDTH=48)
    assert max(before, after) < 2.5, "it is read the right way round: no flow is 3 pixels off, its opposite 6"


def test_a_flow_without_an_image(run: Run, tmp_path: Path) -> None:
    for i in range(5):
        draw(tmp_path / f"{i}_img1.png", noise(8, 8, 3))
        write_flo(tmp_path / f"{i}_flow.flo", torch.zeros(2, 8, 8))
    with pytest.raises(SystemExit, match=r"beside .*0_flow.flo there is no image 0_img2.png"):
        run("flow", tmp_path)

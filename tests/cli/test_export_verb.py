"""``cli.py export``: a model as a graph, what is said of it, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import cli
import zoo
from tests.command_line import refused
from tests.toy_weights import publish

SOLVER = "{class_path: FixedPointIteration, init_args: {check_every: 1}}"


@pytest.fixture(autouse=True)
def toy(weights_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    monkeypatch.chdir(tmp_path)


def test_a_model_is_exported_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("toy.pt2").write_text("in the way")
    options = ("--size", "8x8", "--batch", "3", "--solver", SOLVER, "--tol", "1e-2", "--max_steps", "40", "--force")
    cli.main(["export", "tanh_deq.toy", "toy.pt2", *options])
    out = capsys.readouterr().out
    assert "inputs:   image (batch, 1, 8, 8)" in out
    assert "outputs:  output (batch, 10), steps (batch), residual (batch), converged (batch)" in out
    assert out.count("largest difference") == 2
    assert "in 3 of 3 samples" in out
    assert "in 4 of 4 samples" in out

    solver = zoo.implicit.FixedPointIteration(check_every=1, tol=1e-2, max_steps=40)
    model = zoo.load_pretrained("tanh_deq.toy", solver=solver)
    image = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        wanted = model(image)
    found = torch.export.load("toy.pt2").module()(image)
    torch.testing.assert_close(found["output"], wanted)
    assert found["steps"].tolist() == model.deq.report.steps.tolist()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tanh_deq.toy", "toy.bin"], "writes .onnx and .pt2 files; given: 'toy.bin'"),
        (["tanh_deq.toy", "nowhere/toy.pt2"], "there is no folder nowhere"),
        (["tanh_deq.toy", "there.pt2"], "there.pt2 is there already; --force replaces it"),
        (["tanh_deq.toi", "toy.pt2"], "tanh_deq.toy"),
        (["tanh_deq.toy", "toy.pt2", "--size", "8"], "takes a height and a width, like 64x96; given: '8'"),
        (["tanh_deq.toy", "toy.pt2", "--size", "00x8"], "takes a height and a width"),
        (["tanh_deq.toy", "~/nowhere/toy.pt2"], f"there is no folder {Path.home() / 'nowhere'}"),
        (["tanh_deq.toy", "toy.pt2", "--size", "3x3"], "63 entries"),
        (["tanh_deq.toy", "toy.pt2", "--length", "4"], "length is of a text"),
        (["tanh_deq.toy", "toy.pt2", "--batch", "0"], "--batch takes an integer >= 1; given: 0"),
        (["tanh_deq.toy", "toy.pt2", "--solver", "Newton"], "Newton has no form as a graph"),
        (["tanh_deq.toy", "toy.pt2", "--tol", "-1"], "takes a number >= 0"),
        (["tanh_deq.toy", "toy.pt2", "--lenght", "4"], "Did you mean '--length'?"),
    ],
)
def test_mistakes_are_named_and_nothing_is_lost(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.pt2").write_text("kept")
    before = sorted(Path().iterdir())
    assert message in refused(capsys, "export", *args)
    assert sorted(Path().iterdir()) == before
    assert Path("there.pt2").read_text() == "kept"


def test_what_is_to_be_installed_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -r requirements-export.txt" in refused(capsys, "export", "tanh_deq.toy", "toy.onnx")

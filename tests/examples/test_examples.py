"""Each example runs as it is, in a process of its own, and does what it says."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import cli
import zoo
from tests.command_line import ROOT, Fitted, rows, same, weights

EXAMPLES = ROOT / "examples"
FINE_TUNING = {f"finetune_{what}.py" for what in ("classifier", "segmenter", "language_model", "flow")}
"""See test_finetuning.py."""


def run(*command: str, folder: Path) -> str:
    """What a command prints; it succeeds, with nothing that Python would warn of but what the example is about."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    tested = {"coupled_equilibrium.py", "draw_flow.py", "publish_weights.py", *FINE_TUNING}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
    for path in EXAMPLES.glob("*.py"):
        assert f"python examples/{path.name}" in path.read_text(), "its docstring says how it is run"


def test_coupled_equilibrium(tmp_path: Path) -> None:
    printed = run("-W", "error", str(EXAMPLES / "coupled_equilibrium.py"), folder=tmp_path)
    assert "x* (4, 3), y* (4, 5): 4 of 4 samples converged" in printed
    (difference,) = re.findall(r"largest difference from the dense implicit gradient: (\S+)", printed)
    assert float(difference) < 1e-10
    assert not list(tmp_path.iterdir())


def test_draw_flow(tmp_path: Path) -> None:
    printed = run("-W", "error", str(EXAMPLES / "draw_flow.py"), "drawn.png", folder=tmp_path)
    errors = [float(error) for error in re.findall(r"EPE ([\d., ]+) pixels", printed)[0].split(", ")]
    assert all(0 < error < 4 for error in errors)  # of 6 pixels of motion
    assert len(errors) == 4
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.size == (4 * 128 * 2, 4 * 96 * 2)
        assert len(picture.getcolors(10**6)) > 1000


def test_publish_weights(
    fitted: Fitted, weights_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where it publishes into a folder of the test's."""
    shipped = {path: path.read_bytes() for path in (ROOT / "checkpoints").iterdir() if path.is_file()}
    example = str(EXAMPLES / "publish_weights.py")
    monkeypatch.setattr(sys, "argv", [example, fitted.best, "tanh_deq.mine"])
    runpy.run_path(example, run_name="__main__")
    file = weights_folder / "tanh_deq.mine.safetensors"
    written = {path.name for path in weights_folder.iterdir()}
    assert written == {file.name, "tanh_deq.mine.json", "README.md", "cards"}
    assert all(path.read_bytes() == before for path, before in shipped.items())

    (record,) = zoo.list_weights()
    (tested,) = [row for row in rows(fitted.folder / "metrics.csv") if row["test/accuracy"]]
    assert torch.tensor(record.metrics["test_accuracy"]).item() == float(tested["test/accuracy"])
    assert record.num_parameters == sum(value.numel() for value in weights(fitted.best).values())
    assert (record.name, record.arguments["width"]) == ("tanh_deq.mine", 8)
    assert f"`{record.sha256[:12]}…`" in (weights_folder / "README.md").read_text()
    loaded = zoo.load_pretrained("tanh_deq.mine")
    assert same({f"model.{key}": value for key, value in loaded.state_dict().items()}, dict(weights(fitted.best)))

    # What it recorded is what evaluate measures; and it replaces nothing that it is not told to replace.
    monkeypatch.chdir(weights_folder.parent)
    assert cli.main(["evaluate", "tanh_deq.mine", "--device", "cpu"]) is None
    file.write_bytes(b"other")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(example, run_name="__main__")
    assert f"{file} or its record is there already: give another name, or --force" in capsys.readouterr().err
    assert file.read_bytes() == b"other"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--force"])
    runpy.run_path(example, run_name="__main__")
    assert zoo.list_weights() == [record]

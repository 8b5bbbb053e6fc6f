"""``--ckpt_path`` with a file from a stranger: it says which classes made it, and none is imported for its sake."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import DIGITS, QUIET, Fitted, main, metrics, refused

COMMANDS = ("test", "validate", "predict", "fit")
MARKER = "import pathlib\npathlib.Path(__file__).with_name('marker').touch()\n"
OWN = MARKER + "import datamodules\nclass Own(datamodules.DigitsDataModule):\n    pass\n"

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with modules that leave a marker when they are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_a_stranger.py").write_text(MARKER)
    (tmp_path / "my_own_data.py").write_text(OWN)
    yield tmp_path
    for name in ("of_a_stranger", "my_own_data"):
        sys.modules.pop(name, None)


def changed(fitted: Fitted, folder: Path, change: Change) -> str:
    content = torch.load(fitted.best, weights_only=True)
    change(content)
    torch.save(content, folder / "changed.ckpt")
    return str(folder / "changed.ckpt")


@pytest.mark.parametrize("part", ["model", "data"])
@pytest.mark.parametrize("name", ["of_a_stranger.Anything", "subprocess.Popen", "of_a_stranger", "os.system"])
def test_no_module_is_imported(
    fitted: Fitted, here: Path, part: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(fitted, here, lambda content: content["deq_zoo_classes"].update({part: name}))
    for command in COMMANDS:
        told = refused(capsys, command, "--ckpt_path", path)
        assert told.startswith(f"{path} asks for {part} {name!r}, which is no Lightning")
        assert f"name it: --{part} {name}" in told
    assert not (here / "marker").exists()


@pytest.mark.parametrize("parameters", ["hyper_parameters", "datamodule_hyper_parameters"])
def test_nor_for_an_argument(fitted: Fitted, here: Path, parameters: str, capsys: pytest.CaptureFixture[str]) -> None:
    nested = {"solver": {"class_path": "of_a_stranger.Solver", "init_args": {}}}
    path = changed(fitted, here, lambda content: content[parameters].update(model_args=[nested]))
    assert "asks for 'of_a_stranger.Solver' among the arguments of its" in refused(capsys, "test", "--ckpt_path", path)
    assert not (here / "marker").exists()


def test_a_class_of_ones_own_is_named(fitted: Fitted, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line or in a configuration; then it is imported."""
    path = changed(fitted, here, lambda content: content["deq_zoo_classes"].update(data="my_own_data.Own"))
    assert "name it: --data my_own_data.Own" in refused(capsys, "test", "--ckpt_path", path)
    assert not (here / "marker").exists()
    (here / "own.yaml").write_text("data:\n  class_path: my_own_data.Own\n")
    for named in (("--data", "my_own_data.Own"), ("-c", "own.yaml"), ("--config=own.yaml",)):
        done = main("test", *named, "--ckpt_path", path, *QUIET)
        assert type(done.datamodule).__name__ == "Own"
    assert (here / "marker").exists()


@pytest.mark.parametrize("start", ["pretrained", "weights_from", "backbone"])
def test_what_a_run_started_from_is_not_looked_for(fitted: Fitted, here: Path, start: str) -> None:
    """It may be gone, or name a file or an address that a stranger wants to be read."""
    path = changed(
        fitted, here, lambda content: content["hyper_parameters"].update({start: "https://nowhere.invalid/x"})
    )
    assert metrics(main("test", "--ckpt_path", path, *QUIET)) == metrics(
        main("test", "--ckpt_path", fitted.best, *QUIET)
    )


def test_a_run_is_no_file(fitted: Fitted, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "test", "-c", DIGITS, "--ckpt_path", str(fitted.folder))
    assert f"in that folder there are: {fitted.best}" in told

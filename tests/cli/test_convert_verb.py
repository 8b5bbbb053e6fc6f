"""``cli.py convert``: a checkpoint of others, or of a run, as a weights file of the zoo; nothing is lost on the way."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cli
import zoo
from commands.values import parse_overrides, parse_value
from tests.command_line import ROOT, Fitted, refused, same
from zoo.originals.mdeq import original_name
from zoo.weight_files import sha256_of

OUT = "out.safetensors"


@pytest.fixture
def original() -> tuple[Path, dict[str, Tensor]]:
    """A small MDEQ as its authors would have saved it, and its weights as ours."""
    torch.manual_seed(0)
    model = zoo.create_model(
        "mdeq", channels=(8, 16), head_widths=(3, 4), final_width=6, num_classes=5, stem_stride=2, mean=0.5, std=0.2
    )
    path = Path("original.pkl")
    torch.save({original_name(key, segmenter=False): value for key, value in model.state_dict().items()}, path)
    return path, dict(model.state_dict())


def converted(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert cli.main(["convert", *args]) is None
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_an_original(original: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]) -> None:
    path, state = original
    overrides = ("stem_stride=2", "mean=[0.5, 0.5, 0.5]", "solver={class_path: Broyden, init_args: {tol: 1e-4}}")
    out = converted(capsys, str(path), OUT, "--override", *overrides, "--override", "dropout=0.1")
    model = zoo.load_pretrained(OUT)
    assert same(dict(model.state_dict()), state)
    arguments = zoo.spec_of(model).arguments
    assert (arguments["stem_stride"], arguments["mean"], arguments["dropout"]) == (2, [0.5] * 3, 0.1)
    assert arguments["solver"]["class_path"] == "zoo.implicit.Broyden"
    assert arguments["solver"]["init_args"]["tol"] == 1e-4
    size, parameters = Path(OUT).stat().st_size, sum(p.numel() for p in model.parameters())
    assert f"mdeq, {parameters:,} parameters" in out
    assert f"{OUT}, {size:,} bytes, read back and equal bit by bit" in out
    assert f"sha256:     {sha256_of(Path(OUT).read_bytes())}" in out
    assert f"zoo.load_pretrained('{OUT}')" in out
    assert sorted(file.name for file in Path.cwd().iterdir()) == ["original.pkl", OUT]


def test_a_run(fitted: Fitted, capsys: pytest.CaptureFixture[str]) -> None:
    converted(capsys, fitted.best, OUT)
    saved = torch.load(fitted.best, weights_only=True)["state_dict"]
    assert same(dict(zoo.load_pretrained(OUT).state_dict()), {k.removeprefix("model."): v for k, v in saved.items()})


def test_weights_by_their_name_with_another_solver(capsys: pytest.CaptureFixture[str]) -> None:
    converted(capsys, "tanh_deq.digits", OUT, "--override", "solver=Newton")
    model = zoo.load_pretrained(OUT)
    assert zoo.spec_of(model).arguments["solver"]["class_path"] == "zoo.implicit.Newton"
    assert same(dict(model.state_dict()), dict(zoo.load_pretrained("tanh_deq.digits").state_dict()))


def test_the_same_original_makes_the_same_file(
    original: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("a.safetensors", "b.safetensors"):
        converted(capsys, str(original[0]), out, "--override", "stem_stride=2")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


@pytest.mark.parametrize("written", ["file:original.pkl", "~/original.pkl", "original.ckpt", "file:~/original.pkl"])
def test_an_original_however_it_is_called(
    written: str,
    original: tuple[Path, dict[str, Tensor]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    if written.endswith(".ckpt"):
        original[0].rename(written)
    converted(capsys, written, f"~/{OUT}", "--override", "stem_stride=2")
    assert same(dict(zoo.load_pretrained(OUT).state_dict()), original[1])


@pytest.mark.parametrize("written", ["mine.safetensors", "file:mine.safetensors"])
def test_a_file_of_the_zoo_with_another_solver(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.save_weights(zoo.create_model("tanh_deq", width=3), "mine.safetensors")
    converted(capsys, written, OUT, "--override", "solver=Broyden")
    arguments = zoo.spec_of(zoo.load_pretrained(OUT)).arguments
    assert (arguments["width"], arguments["solver"]["class_path"]) == (3, "zoo.implicit.Broyden")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_line_without_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "tanh_deq.digits", OUT, "--override", "num_classes=3"]) is None
    told = capsys.readouterr().err
    assert re.fullmatch(r"warning: tanh_deq\.digits was trained for 10 classes, .* start at random\n", told)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_folder_that_cannot_be_written_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(model: torch.nn.Module, path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(zoo, "save_weights", read_only)
    assert refused(capsys, "convert", "tanh_deq.digits", OUT) == f"{OUT} cannot be written: Read-only file system"


def test_nothing_is_replaced_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    Path(OUT).write_bytes(b"mine")
    assert refused(capsys, "convert", "tanh_deq.digits", OUT) == f"{OUT} is there already; --force replaces it"
    assert Path(OUT).read_bytes() == b"mine"
    converted(capsys, "tanh_deq.digits", OUT, "--force")
    assert zoo.load_pretrained(OUT) is not None
    Path("folder.safetensors").mkdir()
    message = refused(capsys, "convert", "tanh_deq.digits", "folder.safetensors", "--force")
    assert message == "folder.safetensors is there already; it is a folder"


@pytest.mark.parametrize("there", [True, False])
def test_what_cannot_be_written_leaves_nothing_behind(
    there: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a byte, as one would see it when the file is read back."""
    if there:
        Path(OUT).write_bytes(b"mine")
    save = zoo.save_weights

    def lossy(model: torch.nn.Module, path: Path) -> Any:
        spec = save(model, path)
        other = zoo.create_model(spec.model, **spec.arguments)
        save(other, path)
        return spec

    monkeypatch.setattr(zoo, "save_weights", lossy)
    message = refused(capsys, "convert", "tanh_deq.digits", OUT, "--force")
    assert "gave back other bytes than were written" in message
    assert {file.name: file.read_bytes() for file in Path.cwd().iterdir()} == ({OUT: b"mine"} if there else {})


REFUSED = {
    f"nowhere.pkl {OUT}": "nowhere.pkl",
    f"tanh_deq.digit {OUT}": "Did you mean 'tanh_deq.digits'?",
    "tanh_deq.digits out.pkl": "OUT ends with .safetensors, the one format that is written; given: out.pkl",
    "tanh_deq.digits nowhere/out.safetensors": "there is no folder nowhere; make it, or choose another for out.safet",
    f"{ROOT}/README.md {OUT}": "README.md is damaged, or not a file that torch.save wrote",
    f"tanh_deq.digits {OUT} --override width": "an override is KEY=VALUE, like stem_stride=2; given: 'width'",
    f"tanh_deq.digits {OUT} --override =3": "an override is KEY=VALUE",
    f"tanh_deq.digits {OUT} --override solver=[": "'[' is no YAML value",
    f"tanh_deq.digits {OUT} --override width=3 width=4": "the override 'width' is given twice",
    f"tanh_deq.digits {OUT} --override widht=3": "model 'tanh_deq' has no argument 'widht'. Did you mean 'width'?",
    f"tanh_deq.digits {OUT} --override width=wide": "takes int; given: 'wide' (str)",
    f"tanh_deq.digits {OUT} --override solver=Andersn": "unknown solver 'Andersn'. Did you mean 'Anderson'?",
    f"tanh_deq.digits {OUT} --override width=8": "do not fit the model tanh_deq with width=8 changed",
    f"tanh_deq.digits {OUT} --forc": "unknown argument '--forc'. Did you mean '--force'?",
    "tanh_deq.digits": "the following arguments are required: OUT.safetensors",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_is_refused(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert REFUSED[typed] in refused(capsys, "convert", *typed.split())
    assert not list(Path.cwd().iterdir())


def test_a_pickle_with_code_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path("ran").touch, ())

    torch.save({"weight": Evil()}, "evil.pkl")
    assert "evil.pkl" in refused(capsys, "convert", "evil.pkl", OUT)
    assert [file.name for file in Path.cwd().iterdir()] == ["evil.pkl"]


# -------------------------------------------------------------------------------------------------------------- values


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**9), 10**9) | st.booleans() | st.none())
def test_numbers_are_what_they_look_like(value: float | bool | None) -> None:
    written = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    assert parse_value(written) == value
    assert parse_overrides([f"key=[{written}, {{a: {written}}}]"]) == {"key": [value, {"a": value}]}


@pytest.mark.parametrize("word", ["pre", "1e", "e5", "2e3x", "1.0.0", "Newton"])
def test_words_stay_words(word: str) -> None:
    assert parse_value(word) == word
    assert re.fullmatch(r"\S+", word)

"""Weight files: what is written is read bit by bit, and no header is believed before it was compared with the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import zoo
from tests.command_line import same
from zoo import weight_files
from zoo.weight_files import parse_weights, read_weights, save_weights

DTYPES = sorted(weight_files._DTYPE_NAMES, key=str)


class Anything(nn.Module):
    """A model that says it has these tensors."""

    def __init__(self, state: dict[str, Tensor], **arguments: Any) -> None:
        super().__init__()
        self._state = state
        self._zoo_spec = zoo.ModelSpec("anything", arguments)  # type: ignore[assignment]

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return self._state


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    return torch.tensor(list(raw), dtype=torch.uint8).view(dtype).reshape(shape)


@given(state=st.dictionaries(st.text(max_size=8), tensors(), max_size=4), width=st.integers())
@settings(max_examples=60, deadline=None)
def test_there_and_back(state: dict[str, Tensor], width: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As safetensors' own reader reads it too."""
    state.pop("__metadata__", None)
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    spec = save_weights(Anything(state, width=width), path)
    found, read = read_weights(path)
    assert found == spec
    expected = {key: state[key] for key in sorted(state)}
    assert same(read, expected)
    theirs = safetensors.torch.load_file(path)
    assert same({key: theirs[key] for key in sorted(theirs)}, expected)


def test_a_file_that_others_wrote_has_no_model(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    state = {"a": torch.rand(2, 3), "b": torch.arange(3)}
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    assert same(read_weights(path), (None, state))


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    """Others do not pad theirs, and their numbers begin anywhere."""
    for name in ("a", "ab", "abc", "abcd", "abcde"):
        body = json.dumps({name: {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}).encode()
        data = bytearray(len(body).to_bytes(8, "little") + body) + torch.tensor([1.5, -2]).double().numpy().tobytes()
        assert same(parse_weights(data, "x"), (None, {name: torch.tensor([1.5, -2], dtype=torch.float64)}))


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.safetensors"
    save_weights(Anything({"a": torch.zeros(3)}), path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(Anything({"a": torch.ones(3)}), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------------------------- refusals


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def file_of(header: Any, data: bytes = bytes(8), *, length: int | None = None) -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray((len(text) if length is None else length).to_bytes(8, "little") + text + data)


HUGE = 2**62
REFUSED: dict[str, tuple[bytearray, str]] = {
    "empty": (bytearray(), "it has 0 bytes"),
    "seven bytes": (bytearray(7), "it has 7 bytes"),
    "no header": (file_of(b""), "its header would have 0"),
    "header longer than the file": (file_of({"a": entry()}, length=1000), "its header would have 1,000"),
    "header of 2^64 - 1": (file_of({"a": entry()}, length=2**64 - 1), "would have 18,446,744,073,709,551,615"),
    "header cut": (file_of({"a": entry()}, length=20), "its header is no JSON"),
    "header not text": (file_of(b"\xff\xfe{}"), "its header is no JSON"),
    "nested": (file_of(b"[" * 200_000), "its header is no JSON"),
    "nested objects": (file_of(b'{"a":' * 100_000), "its header is no JSON"),
    "a number of 10,000 digits": (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "its header is no JSON"),
    "list": (file_of([1]), "its header is a list"),
    "twice": (file_of(b'{"a":1,"a":2}'), "it has one key twice"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "no words"),
    "no metadata": (file_of({"__metadata__": 3}), "no words"),
    "no entry": (file_of({"a": 3}), "'a' is not described by dtype, shape and data_offsets"),
    "more": (file_of({"a": entry(path="/etc/passwd")}), "'a' is not described by dtype"),
    "dtype": (file_of({"a": entry(dtype="F3")}), "'a' is of unknown dtype 'F3'"),
    "dtype list": (file_of({"a": entry(dtype=["F32"])}), "'a' is of unknown dtype"),
    "negative": (file_of({"a": entry(shape=[-2])}), "no counts"),
    "two negatives": (file_of({"a": entry(shape=[-2, -1])}), "no counts"),
    "fraction": (file_of({"a": entry(shape=[2.0])}), "no counts"),
    "true": (file_of({"a": entry(shape=[2, True])}), "no counts"),
    "shape": (file_of({"a": entry(shape=[3])}), "has another size than its shape"),
    "huge": (file_of({"a": entry(shape=[HUGE], data_offsets=[0, 4 * HUGE - 1])}), "no counts"),
    "huge shape": (file_of({"a": entry(shape=[HUGE])}), "has another size than its shape"),
    "huge and empty": (file_of({"a": entry(shape=[0, HUGE, HUGE], data_offsets=[0, 0])}, b""), "another size"),
    "dimensions": (file_of({"a": entry(shape=[1] * 20 + [2])}), "no counts"),
    "three offsets": (file_of({"a": entry(data_offsets=[0, 4, 8])}), "no counts"),
    "backwards": (file_of({"a": entry(data_offsets=[8, 0])}), "has another size than its shape"),
    "out of range": (file_of({"a": entry(data_offsets=[8, 16])}), "'a' begins at byte"),
    "too short": (file_of({"a": entry()}, bytes(7)), "its tensors end at"),
    "too long": (file_of({"a": entry()}, bytes(9)), "its tensors end at"),
    "overlap": (file_of({"a": entry(), "b": entry()}), "'b' begins at byte"),
    "gap": (file_of({"a": entry(), "b": entry(data_offsets=[9, 17])}, bytes(17)), "'b' begins at byte"),
    "not said": (file_of({"__metadata__": {"deq_zoo": "3"}, "a": entry()}), "does not say what it is"),
    "nonsense said": (file_of({"__metadata__": {"deq_zoo": "[" * 100_000}, "a": entry()}), "does not say what it is"),
    "no digest": (file_of({"__metadata__": {"deq_zoo": '{"model": "a", "arguments": {}}'}, "a": entry()}), "no digest"),
    "wrong digest": (
        file_of({"__metadata__": {"deq_zoo": '{"model": "a", "arguments": {}, "digest": "0"}'}, "a": entry()}),
        "the digest of its content is ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_headers_that_lie(name: str, tmp_path: Path) -> None:
    data, told = REFUSED[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    for read in (read_weights, zoo.load_pretrained, zoo.load_original):
        with pytest.raises(zoo.WeightsError) as error:
            read(path)
        message = str(error.value)
        assert message.startswith(f"{path} ")
        assert told in message
        assert "nothing was loaded" in message
        assert "\n" not in message
        assert len(message) < 1000
        assert error.value.__suppress_context__ or error.value.__context__ is None


def changed(data: bytearray, change: Callable[[dict[str, Any]], object]) -> bytearray:
    """The file with another header, and its digest as it was."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    change(header)
    return file_of(header, bytes(data[8 + length :]))


def said(header: dict[str, Any], **changes: Any) -> None:
    header["__metadata__"]["deq_zoo"] = json.dumps({**json.loads(header["__metadata__"]["deq_zoo"]), **changes})


@pytest.mark.parametrize(
    "change",
    [
        lambda header: said(header, model="tanh"),
        lambda header: said(header, arguments={"width": 4}),
        lambda header: said(header, digest=None),
        lambda header: said(header, digest=3),
        lambda header: header.update(c=header.pop("a")),
        lambda header: header.update(a=header["b"], b=header["a"]),
        lambda header: header["a"].update(dtype="I32"),
        lambda header: header["a"].update(shape=[2, 1]),
    ],
    ids=["model", "arguments", "no digest", "digest", "name", "two names", "dtype", "shape"],
)
def test_the_digest_is_of_all(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_weights(Anything({"a": torch.zeros(2), "b": torch.ones(2)}, width=3), path)
    data = bytearray(path.read_bytes())
    spec, state = parse_weights(changed(data, lambda _: None), "x")
    assert spec == zoo.ModelSpec("anything", {"width": 3})
    assert same(state, {"a": torch.zeros(2), "b": torch.ones(2)})
    with pytest.raises(zoo.WeightsError, match="nothing was loaded"):
        parse_weights(changed(data, change), "x")


def test_what_is_no_file(tmp_path: Path) -> None:
    """A pipe would never end."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path, why in (
        (tmp_path / "pipe.safetensors", "it is a device, and no file"),
        (Path("/dev/zero"), "it is a device, and no file"),
        (tmp_path, "it is a folder, and no file"),
        (tmp_path / "none.safetensors", "No such file or directory"),
    ):
        with pytest.raises(zoo.WeightsError, match=f"^{path} cannot be read: {why}$"):
            read_weights(path)


def test_a_file_is_in_memory_once(tmp_path: Path) -> None:
    """The tensors are where its bytes are."""
    path = tmp_path / "mine.safetensors"
    save_weights(Anything({"a": torch.rand(64), "b": torch.rand(64)}), path)
    data = bytearray(path.read_bytes())
    _, state = parse_weights(data, "x")
    data[-256:] = bytes(256)
    assert not state["b"].any()
    assert state["a"].all()


@pytest.mark.parametrize(
    ("path", "told"), [("nowhere/a.safetensors", "there is no folder .*nowhere"), ("", "is a folder")]
)
def test_where_nothing_can_be_written(path: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(
        zoo.WeightsError, match=rf"^weights cannot be written to {tmp_path / path}: .*{told}; give the pa"
    ):
        save_weights(zoo.create_model("tanh_deq", width=6), tmp_path / path)
    assert not [*tmp_path.iterdir()]

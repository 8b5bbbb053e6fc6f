"""Weights in ``.safetensors`` files whose header holds the model's name and arguments, and a digest of all.

Such a file is 8 bytes that give the length of its header, the header in JSON, and the bytes of the tensors one after
another. It is read here and not by a library, because nothing may be allocated before all sizes have been compared,
and because the bytes that are verified have to be the bytes that are used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import WeightsError
from .registry import ModelSpec, spec_of

_OURS = "deq_zoo"  # the one key of the header: safetensors writes several in any order, and files could not be compared
_LONGEST_HEADER = 2**20  # bytes; a tensor takes about a hundred of them, and what is read from them 24 times as many
_MOST_DIMENSIONS = 16

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    """A tensor as the header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    end: int


# --------------------------------------------------------------------------------------------------------------- write


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> ModelSpec:
    """Write a model that the zoo made to a ``.safetensors`` file, its name and arguments in the header.

    Beside them is the sha256 of both and of the tensors, which :func:`zoo.load_pretrained` checks. The file appears
    whole or not at all.

    Raises:
        ValueError: the model was not made by :func:`zoo.create_model` or :func:`zoo.load_pretrained`.
        WeightsError: the path is a folder, or in none.
    """
    import safetensors.torch

    spec = spec_of(model)
    path = Path(path).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise WeightsError(
            f"weights cannot be written to {path}: {what}; give the path of a file in a folder that exists"
        )
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    content = ((key, _DTYPE_NAMES[x.dtype], tuple(x.shape), _bytes_of(x)) for key, x in sorted(state.items()))
    made_of = {"model": spec.model, "arguments": spec.arguments}
    header = {_OURS: json.dumps({**made_of, "digest": _digest(made_of, content)}, sort_keys=True)}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(safetensors.torch.save(state, metadata=header))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return spec


def _bytes_of(x: Tensor) -> memoryview:
    return x.reshape(-1).view(torch.uint8).numpy().data


def _digest(made_of: Mapping[str, Any], content: Iterator[tuple[str, str, tuple[int, ...], memoryview]]) -> str:
    """The sha256 over the model's name and arguments, and each tensor's name, dtype, shape and bytes.

    Args:
        made_of: the keys ``model`` and ``arguments``.
        content: the tensors in the order of their names.
    """
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    for name, dtype, shape, data in content:
        digest.update(json.dumps([name, dtype, shape]).encode())
        digest.update(data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- read


def sha256_of(data: bytes | bytearray) -> str:
    """The hexadecimal sha256 digest."""
    return hashlib.sha256(data).hexdigest()


def read_file(path: str | os.PathLike[str]) -> bytearray:
    """All bytes of a file, read once: what is verified and what is parsed are the same.

    Raises:
        WeightsError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device"
            raise WeightsError(f"{path} cannot be read: it is {what}, and no file")
        data = bytearray(found.st_size)
        with path.open("rb", buffering=0) as file:
            read = 0
            with memoryview(data) as rest:
                while count := file.readinto(rest[read:]):
                    read += count
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from None
    if read < len(data):
        raise WeightsError(f"{path} became shorter while it was read; read it again when it is written")
    return data


def read_weights(
    path: str | os.PathLike[str], *, check: Callable[[bytearray], None] | None = None
) -> tuple[ModelSpec | None, dict[str, Tensor]]:
    """What is in a file; see :func:`parse_weights`, and :func:`read_file` for what else is refused.

    Args:
        path: the file, whatever it is called.
        check: is given all bytes before anything else looks at them, and raises if they are not the right ones.
    """
    data = read_file(path)
    if check is not None:
        check(data)
    return parse_weights(data, os.fspath(path))


def parse_weights(data: bytearray, where: str) -> tuple[ModelSpec | None, dict[str, Tensor]]:
    """The model and the tensors in the bytes of a ``.safetensors`` file.

    Args:
        data: the whole file; the tensors share its memory.
        where: what it was read from, for messages.

    Returns:
        the model, as :func:`save_weights` wrote it, and the tensors, of which every byte was verified; None and the
        tensors of a file that others wrote.

    Raises:
        WeightsError: it is no such file, or it was damaged or changed since it was written.
    """
    ours, entries = _read_header(data, where)
    spec = None if ours is None else _verified(ours, data, entries, where)
    return spec, {entry.name: _tensor(data, entry) for entry in entries}


def _read_header(data: bytearray, where: str) -> tuple[str | None, list[_Entry]]:
    """What :func:`save_weights` wrote into the header, if it did, and the tensors in the order of their names."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10 or not 2 <= length <= min(_LONGEST_HEADER, len(data) - 8):
        raise _damaged(where, f"it has {len(data):,} bytes, and its header would have {length:,}")
    try:
        with memoryview(data) as view:
            header = json.loads(str(view[8 : 8 + length], "utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(where, f"its header is a {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(where, "the __metadata__ of its header are no words")
    entries = [_entry(name, given, 8 + length, where) for name, given in header.items()]
    end = 8 + length
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != end:
            raise _damaged(
                where, f"{entry.name[:80]!r} begins at byte {entry.start:,}, and what is before ends at {end:,}"
            )
        end = entry.end
    if end != len(data):
        raise _damaged(where, f"it has {len(data):,} bytes, and its tensors end at {end:,}")
    return metadata.get(_OURS), sorted(entries, key=lambda entry: entry.name)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has one key twice")
    return found


def _entry(name: str, given: Any, offset: int, where: str) -> _Entry:
    """A tensor of the header, whose size is that of its shape."""
    named = f"its tensor {name[:80]!r}"
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(where, f"{named} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _damaged(where, f"{named} is of unknown dtype {str(dtype)[:20]!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or len(shape) > _MOST_DIMENSIONS:
        raise _damaged(where, f"the shape and the two data_offsets of {named} are no counts")
    start, end = offsets
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - start or math.prod(max(n, 1) for n in shape) >= 2**63:
        raise _damaged(where, f"{named} has another size than its shape")
    return _Entry(name, dtype, tuple(shape), offset + start, offset + end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _verified(ours: str, data: bytearray, entries: list[_Entry], where: str) -> ModelSpec:
    """The model that the header names, if all is as it was written."""
    try:
        made_of = json.loads(ours)
    except (ValueError, RecursionError):
        made_of = None
    if not isinstance(made_of, dict) or not made_of.keys() <= {"model", "arguments", "digest"}:
        raise _damaged(where, f"its header's {_OURS!r} does not say what it is")
    digest = made_of.pop("digest", None)
    if digest is None:
        raise WeightsError(
            f"{where} has no digest of its tensors, so that nobody can tell whether it is whole: it was not written by "
            "this version of zoo.save_weights; nothing was loaded. Take the file from where it is published, or write "
            "it again"
        )
    with memoryview(data) as view:
        content = ((entry.name, entry.dtype, entry.shape, view[entry.start : entry.end]) for entry in entries)
        found = _digest(made_of, content)
    if found != digest:
        raise _damaged(where, f"the digest of its content is {found}, and its header says {str(digest)[:80]}")
    model, arguments = made_of.get("model"), made_of.get("arguments")
    if not isinstance(model, str) or not isinstance(arguments, dict):
        raise _damaged(where, f"its header's {_OURS!r} names no model and arguments")
    return ModelSpec(model, arguments)


def _tensor(data: bytearray, entry: _Entry) -> Tensor:
    """The tensor, in the memory of the file's bytes."""
    dtype = _DTYPES[entry.dtype]
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype, device="cpu")
    raw = torch.frombuffer(data, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start)
    if entry.start % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(entry.shape)


def _damaged(where: str, why: str) -> WeightsError:
    return WeightsError(
        f"{where} is damaged, or not a safetensors file: {why}; nothing was loaded. Take it again from where it is "
        "published"
    )

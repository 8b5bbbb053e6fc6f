"""The one door through which a pickle is read: it may hold tensors and plain data, and nothing that would run.

What ``torch.save`` writes are pickles. ``torch.load(weights_only=True)`` runs no code of theirs, but it believes the
sizes that they declare and compares no checksum. Here both are checked before it reads.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickletools
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._weights_only_unpickler import Unpickler, _get_allowed_globals
from torch.serialization import StorageType
from torch.storage import TypedStorage

from .errors import WeightsError
from .weight_files import read_file

_ZIP = b"PK\x03\x04"
_PICKLES = {b"\x80", b"(", b"c"}  # how they begin, mostly
_MARKED_AS_FOLDER = 0x10
_OLD_FORMAT = 5  # pickles in a row: a number, the format's version, the writer's machine, the content, its storages


_NEEDED = {
    "collections.OrderedDict",
    "collections.Counter",  # of schedules
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.nn.parameter.Parameter",
    "torch.Size",
    "torch.device",
    "builtins.set",
    "builtins.complex",
    "_codecs.encode",  # of bytes
    *(name for name, kind in _get_allowed_globals().items() if isinstance(kind, torch.dtype | StorageType)),
}
"""What tensors and plain data are made with. ``torch.load`` allows more, also what takes a size and so much memory."""


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether a file is to be read by :func:`read_pickle`: not if it begins as safetensors do, or is called so."""
    path = Path(path)
    start = b""
    if path.is_file():
        with contextlib.suppress(OSError), path.open("rb") as file:  # who reads it says why it cannot be read
            start = file.read(9)
    if start.startswith(_ZIP):
        return True
    return start[8:] != b"{" and (start[:1] in _PICKLES or path.suffix != ".safetensors")


def read_pickle(
    path: str | os.PathLike[str],
    *,
    kind: str = "file that torch.save wrote",
    only_zip: bool = False,
    check: Callable[[bytes], None] | None = None,
) -> Any:
    """What ``torch.save`` wrote into a file, if that is tensors and plain data.

    Every byte of a zip archive, which torch.save writes since version 1.6, is compared with its checksum; the older
    format has none. The file is read once; while it is, it takes its own size in memory beside what is in it.

    Args:
        path: the file, whatever it is called.
        kind: what it should be, in words, for messages.
        only_zip: refuse the older format.
        check: is given all bytes before anything else looks at them, and raises if they are not the right ones.

    Raises:
        WeightsError: it cannot be read; it is no such file, or is damaged; there is more in it than tensors and plain
            data, of which the message says what it wanted to import; or it declares tensors larger than it has.
    """
    file, where = io.BytesIO(read_file(path)), os.fspath(path)
    if check is not None:
        check(file.getvalue())
    is_zip = file.read(len(_ZIP)) == _ZIP
    try:
        if is_zip:
            _check_archive(file, where)
        elif only_zip:
            file.seek(0)
            _refuse_imports([file] * _OLD_FORMAT, where)  # which is the graver of the two reasons
            raise zipfile.BadZipFile("File is not a zip file")
        else:
            _check_old_format(file, where)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # noqa: BLE001 - bytes that are no checkpoint make a reader raise anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(f"{where} is damaged, or not a {kind}: {reason}") from None


def _check_archive(file: io.BytesIO, where: str) -> None:
    """Raise WeightsError unless all checksums are right, and it holds tensors and data, none larger than its part."""
    with zipfile.ZipFile(file) as archive:
        # Of what torch.save writes no part is compressed or a folder; torch.load would not read what is marked as a
        # folder, and return whatever is in memory.
        parts = archive.infolist()
        names = [part.filename for part in parts]
        strange = [part.filename for part in parts if not _is_plain(part)]
        seen = Counter(name.lower() for name in names)  # as torch's reader finds them
        strange += [name for name in names if seen[name.lower()] > 1]
        damaged = strange[0] if strange else archive.testzip()
        if damaged is not None:
            raise WeightsError(f"{where} is damaged: its part {damaged} does not match its checksum or its kind")
        folder = names[0].partition("/")[0]
        prefix = f"{folder}/data/"
        sizes = {p.filename.removeprefix(prefix): p.file_size for p in parts if p.filename.startswith(prefix)}
        content = archive.read(f"{folder}/data.pkl")
        _refuse_imports([io.BytesIO(content)], where)
        _read_without_tensors(io.BytesIO(content), where, lambda key: sizes.get(key, -1))


def _is_plain(part: zipfile.ZipInfo) -> bool:
    stored = part.compress_type == zipfile.ZIP_STORED and part.compress_size == part.file_size
    return stored and not part.external_attr & _MARKED_AS_FOLDER


def _check_old_format(file: io.BytesIO, where: str) -> None:
    """Raise WeightsError where it holds more than tensors and data, or they are declared larger than the file."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    _refuse_imports([file] * _OLD_FORMAT, where)
    file.seek(0)
    for _ in range(_OLD_FORMAT):
        declared = sum(_read_without_tensors(file, where, lambda _: size).values())
        if declared > size:
            raise WeightsError(_too_large(where, declared, size))


def _read_without_tensors(file: io.BytesIO, where: str, room: Callable[[str], int]) -> dict[str, int]:
    """Read one pickle as torch.load will, with tensors that take no memory.

    Args:
        file: which stands at its beginning.
        where: it comes from.
        room: for the bytes of a storage, by its key.

    Returns:
        the bytes of each storage, by its key.

    Raises:
        WeightsError: a storage is larger than there is room for.
    """
    declared: dict[str, int] = {}

    def storage(saved_id: Any) -> TypedStorage:
        _, storage_type, key, _, count = saved_id[:5]
        dtype = torch.uint8 if storage_type is UntypedStorage else storage_type.dtype
        size = count * dtype.itemsize
        if not 0 <= size <= room(key):
            raise WeightsError(_too_large(where, size, max(0, room(key))))
        declared[key] = max(size, declared.get(key, 0))
        return TypedStorage(wrap_storage=UntypedStorage(size, device="meta"), dtype=dtype, _internal=True)

    unpickler = Unpickler(file, encoding="utf-8")
    unpickler.persistent_load = storage  # type: ignore[method-assign]  # as torch.load does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch.load will say too
        unpickler.load()
    return declared


def _too_large(where: str, declared: int, there: int) -> str:
    return f"{where} is damaged: it declares {declared:,} bytes of tensors where it has {there:,}; nothing was loaded"


def _refuse_imports(pickles: Iterable[io.BytesIO], where: str) -> None:
    """Raise WeightsError where a pickle asks for something that is neither in ``_NEEDED`` nor allowed by the user.

    Args:
        pickles: read to the end of each; where one is damaged, as far as it can be read.
        where: they come from.
    """
    asked: set[str] = set()
    with contextlib.suppress(Exception):  # what is damaged asks for no more than what was read until there
        for pickled in pickles:
            for name in _imports(pickled):
                asked.add(name)
    allowed = torch.serialization.get_safe_globals()
    by_user = {f"{x.__module__}.{x.__qualname__}" for x in allowed if isinstance(x, type | FunctionType)}
    if refused := sorted(asked - _NEEDED - by_user):
        raise WeightsError(
            f"{where} holds more than tensors and plain data, so loading it could run code, and it was refused; "
            f"nothing was loaded. It asks for {_list(refused)}. Where you trust its source, open it yourself "
            "with torch.load(path, weights_only=False), and save its state dict alone"
        )


def _imports(pickled: io.BytesIO) -> Iterator[str]:
    """The dotted names that a pickle imports, in its order. The file is left at the pickle's end."""
    words: list[str] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        top: Any = None  # the word that this instruction pushes, if it is one
        match opcode.name:
            case "GLOBAL" | "INST":
                yield _dotted(*str(argument).split(" ", 1))
            case "STACK_GLOBAL":
                yield _dotted(*words[-2:])
            case "MEMOIZE":
                memo[len(memo)] = words[-1] if words else None
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = words[-1] if words else None
            case "GET" | "BINGET" | "LONG_BINGET":
                top = memo.get(argument)
            case _:
                top = argument
        if isinstance(top, str):
            words.append(top)


def _dotted(module: str, name: str) -> str:
    return f"{module.replace('__builtin__', 'builtins')}.{name}"


def refuse_hollow(state: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError where a tensor has fewer numbers than its shape says, as one with steps of 0 has."""
    for key, value in state.items():
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise WeightsError(
                f"{where} is damaged: its {key[:80]!r} has shape {tuple(value.shape)}, and is made of "
                f"{value.untyped_storage().nbytes():,} bytes; nothing was loaded"
            )


def _list(names: list[str], most: int = 6) -> str:
    """Of what strangers wrote, so much as fits into a line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(ascii(name[:80])[1:-1] for name in names[:most]) + more

"""Pretrained weights: one line brings a model from any source, and every byte is verified before it is used."""

from __future__ import annotations

import difflib
import logging
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor, nn

from . import cache
from .blobs import checked_sha256
from .errors import ReinitializedWarning, WeightsError
from .implicit.choices import nearest
from .pickles import is_pickle, read_pickle
from .records import ORIGINAL, WeightsRecord, all_records
from .registry import ModelSpec, create_model, spec_of
from .sources import fetch, is_remote
from .weight_files import read_weights, sha256_of

log = logging.getLogger("zoo")

SOURCES = (
    "a name of zoo.list_weights(), a file, a folder, file:PATH, https:..., hf:org/name[@revision], "
    "wandb:entity/project/artifact:alias, or torchvision:Raft_Large_Weights...."
)

_FILE, _TORCHVISION = "file:", "torchvision:"
_SCHEME = re.compile(r"[A-Za-z][\w+.-]+:")
_SUFFIXES = {".safetensors", ".ckpt", ".pth", ".pt", ".pkl", ".tar", ".bin"}
_IN_FOLDERS = ("model.safetensors", "checkpoints/best.ckpt", "best.ckpt")  # of save_pretrained, and of a run
_OF_THE_MODEL = "model."  # how the keys of a task's model begin in its checkpoints


class ForeignWeightsError(WeightsError):
    """A file is whole, and was not written by this zoo."""


class _Pin(NamedTuple):
    """A sha256 that a file has to have."""

    sha256: str
    says: str  # who says so
    advice: str


@dataclass(frozen=True)
class _Found:
    """A source as a local file.

    Attributes:
        where: how the user called it.
        path: which is read.
        record: of the weights, if they have one.
        pins: what the file's sha256 has to be.
    """

    where: str
    path: Path
    record: WeightsRecord | None
    pins: tuple[_Pin, ...]

    def check(self, data: bytes | bytearray) -> None:
        """Raise WeightsError unless these bytes of the file are the right ones."""
        for pin in self.pins:
            found = sha256_of(data)
            if found != pin.sha256:
                raise WeightsError(
                    f"{self.path} is damaged or was replaced: its sha256 is {found}, {pin.says} {pin.sha256}; "
                    f"nothing was loaded. {pin.advice}"
                )


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    sha256: str | None = None,
    averaged: bool = True,
    **overrides: Any,
) -> nn.Module:
    """A model with trained weights, in eval mode and on the CPU.

    Whatever the source, no code of it is run, its sizes are compared before anything is allocated, and every byte is
    verified: against the record, against ``sha256``, and against the digest in a file of the zoo or the checksums of a
    checkpoint.

    Args:
        source: one of

            - a name of :func:`list_weights`, like ``"tanh_deq.digits"``. Of weights that the original authors
              published the error says which file to get, and where to put it;
            - a path, or ``file:PATH``: of a ``.safetensors`` file that :func:`save_weights` wrote; of a checkpoint of
              a Lightning run of this zoo; of a folder of ``save_pretrained``, or of a run, whose best checkpoint is
              taken;
            - ``https://host/path``, ``hf:org/name[@revision]`` of the Hugging Face hub, or
              ``wandb:entity/project/artifact:alias``: such a file, fetched once and kept; see :mod:`zoo.sources`;
            - ``"torchvision:Raft_Large_Weights.C_T_V2"``: torchvision's weights of RAFT as the start of a DEQ-Flow, as
              :func:`zoo.load_original` makes it of them; kept in ``torch.hub.get_dir()/checkpoints``.

        cache_dir: where fetched files are kept; see :func:`zoo.cache.cache_dir`.
        offline: open no connection; see :func:`zoo.cache.is_offline`.
        sha256: of the whole file, in hexadecimal digits; another file is refused.
        averaged: of a checkpoint of a run with weight averaging (``EMAWeightAveraging``), take the averaged weights,
            which is logged; otherwise those of the last step.
        overrides: arguments of the model to change. ``solver`` and ``gradient`` can be anything; another
            ``num_classes`` leaves the classifier at random, with a :class:`ReinitializedWarning` that lists what.

    Raises:
        ValueError: unknown name, kind of source, or argument.
        WeightsError: the file is missing, cannot be fetched, is damaged, is unsafe, has another sha256 than it should,
            or does not fit the model.

    Example:
        >>> model = zoo.load_pretrained("mdeq_nano.digits", num_classes=3)
        >>> model = zoo.load_pretrained("runs/version_0")
    """
    name = os.fspath(source)
    if name.startswith(_TORCHVISION):
        return _from_torchvision(name, cache_dir, offline, sha256, overrides)
    found = _find(name, cache_dir, offline, sha256)
    if found.record is not None and found.record.source == ORIGINAL:
        spec, state = _read_original(found, found.record)
    else:
        spec, state = _read(found, averaged=averaged)
    if overrides and found.record is None:
        _refuse_misfits(_without_memory(spec, {}, name), state, [], name, {})  # what it says of itself, first
    if found.record is not None and found.record.source != ORIGINAL:
        # What ships is known to fit into memory, and first use of torch's meta device takes a second or two.
        model = create_model(spec.model, **{**spec.arguments, **overrides})
    else:
        model = _without_memory(spec, overrides, name)
    fresh = _fresh_keys(model, state, overrides.get("num_classes"))
    _refuse_misfits(model, state, fresh, name, overrides)
    if fresh:
        warnings.warn(
            f"{name} was trained for {len(state[fresh[0]])} classes, and {overrides['num_classes']} were asked for: "
            f"{', '.join(fresh)} start at random",
            ReinitializedWarning,
            stacklevel=2,
        )
    return _filled(model, {key: value for key, value in state.items() if key not in fresh}, fresh).eval()


# ------------------------------------------------------------------------------------------------ from sources to files


def is_source(source: str) -> bool:
    """Whether this is something else than the path of a file: what else :func:`load_pretrained` takes."""
    return (
        is_remote(source)
        or source.startswith((_FILE, _TORCHVISION))
        or source in all_records()
        or Path(source).expanduser().is_dir()
    )


def _find(source: str, cache_dir: str | os.PathLike[str] | None, offline: bool | None, sha256: str | None) -> _Found:
    pins = []
    if sha256 is not None:
        pins.append(_Pin(checked_sha256(sha256), "and it was asked for", f"Look where {source} comes from"))
    record = all_records().get(source)
    if record is None and is_remote(source):
        path = fetch(source, cache_dir=cache_dir, offline=offline, sha256=sha256)
        return _Found(source, path, None, tuple(pins))
    if record is None:
        path = _local(source)
        record = _record_of(path)
    else:
        path = _recorded(record, cache_dir)
    if record is not None and record.source == ORIGINAL:
        pins.extend(_pins_of_original(record, path))
    elif record is not None:
        advice = "Restore the file: git checkout -- checkpoints, or install the package again"
        pins.append(_Pin(str(record.sha256), "its record says", advice))
    return _Found(source, path, record, tuple(pins))


def _local(source: str) -> Path:
    """The file that a path means, which can be that of a folder."""
    path = _path(source)
    if path.is_dir():
        for name in _IN_FOLDERS:
            if (path / name).is_file():
                return path / name
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise WeightsError(
            f"the folder {path} has none of {', '.join(_IN_FOLDERS)}; there is: {there}. Give the path of a file, or "
            "a folder of save_pretrained or of a run"
        )
    if path.exists():
        return path
    if source.startswith(_FILE) or (not _SCHEME.match(source) and (path.suffix in _SUFFIXES or os.sep in source)):
        raise WeightsError(f"there is no file {path}{_near(path)}. load_pretrained takes {SOURCES}")
    raise ValueError(f"unknown weights {source!r}.{nearest(source, sorted(all_records()))} It takes {SOURCES}")


def _path(source: str) -> Path:
    """``file:///a/b``, ``file:b`` and ``b`` as paths."""
    if source.startswith(f"{_FILE}//"):
        return Path(url2pathname(urlsplit(source).path))
    return Path(source.removeprefix(_FILE)).expanduser()


def _near(path: Path) -> str:
    """What a user may have meant by a path that is not there."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    names = sorted(entry.name for entry in path.parent.iterdir())
    close = [name for name in names if name.startswith(f"{path.name}.")][:3]
    close = close or difflib.get_close_matches(path.name, names, n=3)
    return f"; near is {', '.join(str(path.parent / name) for name in close)}" if close else ""


def _record_of(path: Path) -> WeightsRecord | None:
    """The record of weights that ship, where this path is theirs."""
    record = all_records().get(path.stem)
    ships = record is not None and record.source != ORIGINAL and record.path.resolve() == path.resolve()
    return record if ships else None


def _recorded(record: WeightsRecord, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The file of a record, if it is there."""
    if record.source != ORIGINAL:
        try:
            record.path.stat()
        except OSError as error:
            raise WeightsError(
                f"the weights {record.name} ship in {record.path}, which cannot be read ({error.strerror}); "
                "restore the file: git checkout -- checkpoints, or install the package again"
            ) from None
        return record.path
    path = cache.cache_dir(cache_dir) / record.path.relative_to(cache.cache_dir())
    if not path.is_file():
        raise WeightsError(
            f"{record.name} were published by the original authors, and have to be fetched by hand: get "
            f"{record.file} from {record.download}, and put it at {path}; or give its path to zoo.load_original"
        )
    return path


# ------------------------------------------------------------------------------------------------ from files to tensors


def _read(found: _Found, *, averaged: bool) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The model and the tensors in a file of the zoo, verified.

    Raises:
        WeightsError: see :func:`load_pretrained`; ForeignWeightsError if it is a file of others.
    """
    path = found.path
    if is_pickle(path):
        return _in_checkpoint(read_pickle(path, check=found.check), path, averaged=averaged)
    spec, state = read_weights(path, check=found.check)
    if spec is None:
        raise ForeignWeightsError(
            f"{path} does not say which model it belongs to: its header has no 'deq_zoo'. If the original authors "
            "published it, load it with zoo.load_original"
        )
    return spec, state


def _in_checkpoint(content: Any, path: Path, *, averaged: bool) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The model and its tensors in a checkpoint of a run."""
    made_of = content.get("deq_zoo_model") if isinstance(content, dict) else None
    if not isinstance(made_of, dict):
        if isinstance(content, dict) and "deq_zoo_classes" in content:
            raise ForeignWeightsError(
                f"{path} is of a run before checkpoints said which model they hold. Load it with the class that made "
                "it, like ImageClassifier.load_from_checkpoint"
            )
        raise ForeignWeightsError(
            f"{path} is no checkpoint of this zoo: it has no 'deq_zoo_model'. If the original authors published it, "
            "load it with zoo.load_original"
        )
    model, arguments = made_of.get("model"), made_of.get("arguments")
    if not isinstance(model, str) or not isinstance(arguments, dict):
        raise WeightsError(f"{path} is damaged: its 'deq_zoo_model' names no model and arguments")
    return ModelSpec(model, arguments), state_of_checkpoint(content, path, averaged=averaged)


def state_of_checkpoint(
    content: Mapping[str, Any], path: str | os.PathLike[str], *, averaged: bool = True
) -> dict[str, Tensor]:
    """The tensors of the model in what a checkpoint of a run holds; averaged ones where there are, which is logged.

    Raises:
        WeightsError: there are none.
    """
    key = "state_dict"
    if "current_model_state" in content:  # as Lightning's WeightAveraging writes it
        if averaged:
            log.warning(
                "%s has averaged weights, and they are taken; averaged=False takes those of the last step", path
            )
        else:
            key = "current_model_state"
    state = content.get(key)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} is damaged: its {key!r} is no mapping of names to tensors")
    return {k.removeprefix(_OF_THE_MODEL): value for k, value in state.items() if k.startswith(_OF_THE_MODEL)}


# ----------------------------------------------------------------------------------------------- from tensors to models


def _without_memory(spec: ModelSpec, overrides: Mapping[str, Any], where: str) -> nn.Module:
    """The model, its tensors without memory: a file of a few bytes can ask for one that no machine has room for."""
    try:
        with torch.device("meta"):
            return create_model(spec.model, **{**spec.arguments, **overrides})
    except Exception as error:
        if overrides:
            raise
        raise WeightsError(
            f"{where} names a model {spec.model!r} that cannot be made here: {_first_line(error)}; nothing was loaded. "
            "It needs a zoo that has this model"
        ) from None


def _fresh_keys(model: nn.Module, state: Mapping[str, Tensor], num_classes: int | None) -> list[str]:
    """What of the classifier is for another number of classes."""
    prefix = f"{getattr(model, 'classifier_name', '')}."
    keys = [key for key in model.state_dict() if key.startswith(prefix) and key in state and state[key].dim()]
    return keys if num_classes is not None and any(len(state[key]) != num_classes for key in keys) else []


def _refuse_misfits(
    model: nn.Module, state: Mapping[str, Tensor], fresh: list[str], where: str, overrides: Mapping[str, Any]
) -> None:
    from .originals.common import problems

    expected = {key: value for key, value in model.state_dict().items() if key not in fresh}
    if not (different := problems({key: state[key] for key in state if key not in fresh}, expected)):
        return
    given = ", ".join(f"{key}={value!r}" for key, value in overrides.items())
    raise WeightsError(
        f"the weights {where} do not fit the model {spec_of(model).model}"
        + (f" with {given} changed; change only arguments that keep the shapes" if given else " that they name")
        + f". In the file {different}; nothing was loaded"
    )


def _filled(model: nn.Module, state: Mapping[str, Tensor], fresh: list[str]) -> nn.Module:
    """The model with these tensors, and random ones for the keys that are fresh.

    Args:
        model: with memory or without.
        state: all others.
        fresh: keys of the model.
    """
    expected = model.state_dict()
    if all(value.is_meta for value in expected.values()):
        if not fresh and _is_all_in_its_state(model):
            # Nothing is drawn that is overwritten: a model takes no more memory than its file.
            own = {
                key: torch.empty(x.shape, dtype=x.dtype, device="cpu").copy_(state[key].detach())
                for key, x in expected.items()
            }
            model.load_state_dict(own, assign=True)
            return model
        spec = spec_of(model)
        model = create_model(spec.model, **spec.arguments)
    model.load_state_dict({**state, **{key: model.state_dict()[key] for key in fresh}})
    return model


def _is_all_in_its_state(model: nn.Module) -> bool:
    """Whether the model has each of its tensors once, and in its state dict."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    beside = any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())
    return (
        not beside
        and {name for name, _ in tensors} == model.state_dict().keys()
        and len({*map(id, dict(tensors).values())}) == len(tensors)
    )


# -------------------------------------------------------------------------------------- weights of the original authors


def _pins_of_original(record: WeightsRecord, path: Path) -> Iterable[_Pin]:
    advice = f"Get {record.file} from {record.download} again, and put it at {path}"
    if record.sha256 is not None:
        yield _Pin(record.sha256, "its record says", advice)
    beside = _beside(path)
    if beside.exists():
        written = beside.read_text(encoding="utf-8").partition(" ")[0].strip()
        yield _Pin(written, f"{beside} says, of its first use,", f"{advice}; delete {beside} if it has to be another")


def _beside(path: Path) -> Path:
    """Where the sha256 of an original is kept, as sha256sum would write it."""
    return path.with_name(f"{path.name}.sha256")


def _read_original(found: _Found, record: WeightsRecord) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The model and the tensors of an original checkpoint, whose sha256 is kept at its first use."""
    from .originals import make_original, read_original

    seen = []

    def check(data: bytes | bytearray) -> None:
        found.check(data)
        seen.append(sha256_of(data))

    model = make_original(read_original(found.path, check=check), os.fspath(found.path), record.arguments)
    spec = spec_of(model)
    if spec.model != record.model:
        raise WeightsError(
            f"{found.path} is of a model {spec.model}, and {record.name} are weights of {record.model}: it is another "
            f"file than {record.file} of {record.download}"
        )
    beside = _beside(found.path)
    if not beside.exists():
        beside.write_text(f"{seen[0]}  {found.path.name}\n", encoding="utf-8")
    return spec, model.state_dict()


def _from_torchvision(
    name: str,
    cache_dir: str | os.PathLike[str] | None,
    offline: bool | None,
    sha256: str | None,
    overrides: dict[str, Any],
) -> nn.Module:
    """A DEQ-Flow with torchvision's weights of RAFT: see :func:`load_pretrained`."""
    from torchvision.models.optical_flow import Raft_Large_Weights

    from .originals import flow

    known = {f"{_TORCHVISION}Raft_Large_Weights.{key}": entry for key, entry in Raft_Large_Weights.__members__.items()}
    if name not in known:
        if "small" in name.lower():
            raise ValueError(
                f"{name} are of raft_small, whose layers are others than DEQ-Flow's. Known: {', '.join(known)}."
            )
        raise ValueError(f"unknown weights {name!r}.{nearest(name, list(known))}")
    url = known[name].url
    folder = (
        Path(torch.hub.get_dir(), "checkpoints") if cache_dir is None else cache.cache_dir(cache_dir) / "torchvision"
    )
    path = folder / Path(url).name
    begins = path.stem.rpartition("-")[2]  # the digest begins so
    wanted = None if sha256 is None else checked_sha256(sha256)

    def check(data: bytes | bytearray) -> None:
        found = sha256_of(data)
        if not found.startswith(begins):
            raise WeightsError(
                f"{path} is damaged or was replaced: its sha256 does not begin with {begins}; nothing was loaded. "
                "Delete it"
            )
        if wanted not in (None, found):
            raise WeightsError(f"the sha256 of {path} is {found}, and {wanted} was asked for; nothing was loaded")

    if not path.exists():
        if cache.is_offline(offline):
            raise WeightsError(f"{url} is not at {path}, and offline nothing is fetched. Put it there")
        _download(url, path, begins)
    state = read_pickle(path, check=check)
    return flow.load(state, name, overrides)


def _download(url: str, path: Path, begins: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=begins)
    except OSError as error:
        raise WeightsError(
            f"{url} cannot be fetched ({error}). Fetch it where there is a network, and put it at {path}"
        ) from None
    except RuntimeError as error:  # another digest
        raise WeightsError(f"{url} was damaged on its way, and nothing was loaded: {error}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:300] or type(error).__name__

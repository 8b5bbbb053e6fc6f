"""``fit --resume auto``: the run of this name goes on in its own folder, from its last good checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from pytorch_lightning.utilities import rank_zero_info

from lightning_modules.checkpoints import CheckpointError, read_checkpoint
from lightning_modules.usage_errors import UsageError

NAMED_BY = {"CSVLogger": "name", "TensorBoardLogger": "name", "WandbLogger": "project"}
"""Loggers, and which of their arguments is the name of a folder of runs in ``save_dir``."""


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from.

    Attributes:
        checkpoint: as :func:`read_checkpoint` gives it.
        version: of the logger, whose folder is the run's; None where there is no logger.
    """

    checkpoint: dict[str, Any]
    version: int | str | None

    @property
    def path(self) -> Path:
        return Path(self.checkpoint["path"])

    @property
    def step(self) -> int:
        return int(self.checkpoint["step"])

    def of_the_same_run(self, fit: Namespace) -> Namespace:
        """The configuration of ``fit`` with the loggers' folders those of the run."""
        fit = fit.clone()
        if _first_logger(fit.trainer.logger) is None:
            return fit
        for n, logger in enumerate(_list(fit.trainer.logger)):
            version = self.version if n == 0 else self._version_of(n, _kind(logger))
            if version is not None:
                logger.init_args.version = version
                if _kind(logger) == "TensorBoardLogger":
                    logger.dict_kwargs = {**logger.get("dict_kwargs", {}), "purge_step": self.step}
        return fit

    def _version_of(self, n: int, kind: str) -> int | str | None:
        """Of a further logger, if the run had one of this kind in this place."""
        loggers = self.checkpoint["loggers"]
        theirs, version = loggers[n] if n < len(loggers) else (None, None)
        return version if theirs == kind and kind in NAMED_BY else None


def wanted(fit: Namespace) -> bool:
    """Whether ``--resume auto`` is given.

    Raises:
        UsageError: something else is, or ``--ckpt_path`` too.
    """
    if fit.resume is None:
        return False
    if fit.resume != "auto":
        raise UsageError(
            f"--resume takes auto, and finds the run's last good checkpoint by itself; given: {fit.resume}. To go on "
            "from a file, give it as --ckpt_path"
        )
    if fit.ckpt_path is not None:
        raise UsageError(
            f"--resume auto finds a checkpoint, and --ckpt_path {fit.ckpt_path} names one: give one of the two. With "
            "--ckpt_path a run goes on in a new folder, with --resume auto in its own"
        )
    return True


def find(fit: Namespace, typed: str) -> Resumed | None:
    """The last good checkpoint of the run that this configuration of ``fit`` names; None if there is none.

    The newest file is looked at first. Each that cannot be used is told with the reason; so is what comes of it.

    Args:
        fit: the configuration.
        typed: what the user typed; see :func:`read_checkpoint`.

    Raises:
        UsageError: the run has no folder that could be looked through.
    """
    folders = list(_folders(fit))
    for file in _newest_first(folders):
        try:
            checkpoint = read_checkpoint(str(file), typed)
            _refuse_another_run(checkpoint, fit)
        except CheckpointError as error:
            rank_zero_info(f"--resume auto passes over {file}: {str(error).removeprefix(f'{file} ')}")
            continue
        found = Resumed(checkpoint, _version(checkpoint, file, fit))
        rank_zero_info(f"--resume auto goes on from {file} (step {found.step}, epoch {checkpoint['epoch']})")
        return found
    looked = ", ".join(map(str, folders)) or _runs(fit)
    rank_zero_info(f"--resume auto found no good checkpoint in {looked}: training starts from the beginning")
    return None


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    """The checkpoints in these folders; of two of the same time ``last`` before ``best``."""
    files = {file for folder in folders for file in folder.glob("*.ckpt") if file.is_file()}
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)


def _folders(fit: Namespace) -> Iterator[Path]:
    """Where checkpoints of the run may be."""
    for callback in (fit.checkpoint, *(each.get("init_args") or {} for each in _list(fit.trainer.callbacks))):
        if callback.get("dirpath"):
            yield _local(callback["dirpath"])
    logger = _first_logger(fit.trainer.logger)
    if logger is None:
        yield _local(fit.trainer.default_root_dir or ".") / "checkpoints"
        return
    runs, version = _runs(fit), logger.init_args.get("version", logger.init_args.get("id"))
    if version is not None:
        yield runs / _folder_name(version) / "checkpoints"
    else:
        yield from sorted(folder for folder in runs.glob("*/checkpoints") if folder.is_dir())


def _runs(fit: Namespace) -> Path:
    """The folder of all runs of this name."""
    logger = _first_logger(fit.trainer.logger)
    if logger is None:
        return _local(fit.trainer.default_root_dir or ".")
    arguments = logger.init_args
    name = arguments.get(NAMED_BY[_kind(logger)])
    if _kind(logger) == "WandbLogger":
        name = name or os.environ.get("WANDB_PROJECT", "lightning_logs")
    return _local(arguments.get("save_dir") or arguments.get("dir") or ".") / (name or "")


def _version(checkpoint: Mapping[str, Any], file: Path, fit: Namespace) -> int | str | None:
    """Of the logger of the run that wrote a checkpoint; by the file's place, else by what it says."""
    logger = _first_logger(fit.trainer.logger)
    if logger is None:
        return None
    runs = _runs(fit).absolute()
    places = [file.absolute().parent.parent, *(Path(place).absolute() for place in [checkpoint["run"]] if place)]
    name = next((place.name for place in places if place.parent == runs), None)
    if name is None:  # of a folder that was given, by a run whose own folder is gone
        return None
    is_number = _kind(logger) != "WandbLogger" and name.removeprefix("version_").isdigit()
    return int(name.removeprefix("version_")) if is_number else name


def _refuse_another_run(checkpoint: Mapping[str, Any], fit: Namespace) -> None:
    """Raise CheckpointError where it is of another kind of model or data, or holds weights only."""
    if not checkpoint["resumable"]:
        raise CheckpointError("it holds weights only, with no state of optimizer and loops to go on from")
    for part, made_by in checkpoint["made_by"].items():
        asked = fit[part]
        pairs = [(made_by["class_path"].rpartition(".")[2], asked.class_path.rpartition(".")[2])]
        if part == "model":
            pairs.append((made_by["init_args"].get("model"), asked.init_args.get("model")))
        for theirs, ours in pairs:
            if theirs != ours:
                raise CheckpointError(f"it is of another run: its {part} is {theirs}, and {ours} was asked for")


def _first_logger(logger: Any) -> Namespace | None:
    """The configuration of the logger whose folder is the run's; None if there is none.

    Raises:
        UsageError: it is not known where it keeps its runs.
    """
    first: Any = next(iter(_list(logger)), None)
    if first is None or first is False:
        return None
    if first is True or _kind(first) not in NAMED_BY:
        raise UsageError(
            f"--resume auto looks in the folder of the run, which it knows for {', '.join(NAMED_BY)}; given: "
            f"--trainer.logger {first if first is True else _kind(first)}. Give the file as --ckpt_path"
        )
    return cast(Namespace, first)


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _kind(logger: Namespace) -> str:
    return str(logger.class_path).rpartition(".")[2]


def _folder_name(version: int | str) -> str:
    return version if isinstance(version, str) else f"version_{version}"


def _local(folder: str | Path) -> Path:
    if "://" in str(folder):
        raise UsageError(f"--resume auto looks in local folders only; given: {folder}. Give the file as --ckpt_path")
    return Path(folder).expanduser()

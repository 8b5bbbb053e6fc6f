"""Lightning checkpoints, read with care: missing, damaged and foreign files get one clear message each."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, not the zoo's, or of another model."""


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint that the zoo wrote, every byte of it checked.

    Args:
        path: a local ``.ckpt`` file.

    Returns:
        ``made_by``: the configuration of the ``model`` (and, where known, the ``data``) that made it, as
        ``{"class_path": ..., "init_args": ...}``; ``shapes``: parameter name -> shape; ``path``.

    Raises:
        CheckpointError: see the class.
    """
    file = Path(path)
    if not file.is_file():
        folder = file if file.is_dir() else file.parent
        near = sorted(map(str, folder.glob("*.ckpt")))
        there = f"in that folder there are: {', '.join(near)}" if near else "there is no checkpoint in that folder"
        raise CheckpointError(f"no checkpoint at {path}; {there}")
    content = _load(file)
    state, classes = content.get("state_dict"), content.get("deq_zoo_classes")
    if not isinstance(state, dict) or not isinstance(classes, dict):
        raise CheckpointError(
            f"{path} is not a checkpoint of this zoo: it has no "
            f"{'state_dict' if not isinstance(state, dict) else 'deq_zoo_classes'}; "
            f"it holds {', '.join(sorted(map(str, content)))}"
        )
    made_by = {"model": {"class_path": classes["model"], "init_args": dict(content.get("hyper_parameters", {}))}}
    if "data" in classes:
        data = {k: v for k, v in content.get("datamodule_hyper_parameters", {}).items() if not k.startswith("_")}
        made_by["data"] = {"class_path": classes["data"], "init_args": data}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return {"path": path, "made_by": made_by, "shapes": shapes}


def check_fits(checkpoint: dict[str, Any], module: pl.LightningModule) -> None:
    """Raise CheckpointError unless the checkpoint's tensors have the names and shapes of the module's."""
    theirs: dict[str, tuple[int, ...]] = checkpoint["shapes"]
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if theirs == ours:
        return
    differences = [
        f"{name}: {theirs.get(name, 'absent')} in the checkpoint, {ours.get(name, 'absent')} in the model"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise CheckpointError(
        f"{checkpoint['path']} is a checkpoint of another model than the one asked for: "
        f"{'; '.join(differences[:3])}{more}. Leave out --model, and the checkpoint's own model is used"
    )


def _load(file: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            # Of what torch.save writes no part is compressed or a folder; torch.load would not read what is marked as
            # a folder, and return whatever is in memory.
            parts = archive.infolist()
            strange = [p.filename for p in parts if p.compress_type != zipfile.ZIP_STORED or p.external_attr & 0x10]
            # Reads everything and compares checksums; torch.load does not.
            damaged = strange[0] if strange else archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged, or not a checkpoint: {error}") from None
    if damaged is not None:
        raise CheckpointError(f"{file} is damaged: its part {damaged} does not match its checksum or its kind")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and plain data, so loading it could run code, and it was refused: "
            f"{str(error).splitlines()[0]}"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a Lightning checkpoint")
    return content

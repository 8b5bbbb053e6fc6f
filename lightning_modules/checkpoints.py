"""Lightning checkpoints, read with care: missing, damaged and foreign files get one clear message each."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from zoo import WeightsError
from zoo.pickles import read_pickle
from zoo.sources import is_remote


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, not the zoo's, or of another model."""


STARTS = ("pretrained", "backbone", "weights_from")
"""What weights a run may start from; none of them is needed once there is a checkpoint."""


def read_checkpoint(path: str, typed: str = "") -> dict[str, Any]:
    """A checkpoint that the zoo wrote, every byte of it checked.

    A class that it names is one that has been imported already, or one that the user names too: to import a module is
    to run it. What the run started from is left out, since all weights are in the checkpoint.

    Args:
        path: a local ``.ckpt`` file.
        typed: what the user typed, in which a class of his own may be named.

    Returns:
        ``made_by``: the configuration of the ``model`` (and, where known, the ``data``) that made it, as
        ``{"class_path": ..., "init_args": ...}``; ``shapes``: parameter name -> shape; ``path``; ``step`` and
        ``epoch``; ``resumable``: whether it has all that training goes on from; ``run``: the folder of its run;
        ``loggers``: class and version of each of its loggers.

    Raises:
        CheckpointError: see the class.
    """
    if is_remote(path):
        raise CheckpointError(
            f"--ckpt_path takes a local file; given: {path}. Fetch it first, and give its path: Lightning would read "
            "what it fetches as a pickle that may run code. To start from its weights, give them as --model.pretrained"
        )
    file = Path(path)
    if not file.is_file():
        folder = file if file.is_dir() else file.parent
        near = sorted(map(str, (*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt"))))
        there = f"in that folder there are: {', '.join(near)}" if near else "there is no checkpoint in that folder"
        raise CheckpointError(f"no checkpoint at {path}; {there}")
    content = load_content(file)
    state, classes = content.get("state_dict"), content.get("deq_zoo_classes")
    if not isinstance(state, dict) or not isinstance(classes, dict):
        raise CheckpointError(
            f"{path} is not a checkpoint of this zoo: it has no "
            f"{'state_dict' if not isinstance(state, dict) else 'deq_zoo_classes'}; "
            f"it holds {', '.join(sorted(map(str, content)))}"
        )
    hyper_parameters = {k: None if k in STARTS else v for k, v in content.get("hyper_parameters", {}).items()}
    made_by = {"model": {"class_path": classes["model"], "init_args": hyper_parameters}}
    if "data" in classes:
        data = {k: v for k, v in content.get("datamodule_hyper_parameters", {}).items() if not k.startswith("_")}
        made_by["data"] = {"class_path": classes["data"], "init_args": data}
    for part, of_this_kind in (("model", pl.LightningModule), ("data", pl.LightningDataModule)):
        if part in made_by and not (_is_imported(made_by[part], of_this_kind) or _is_named(made_by[part], typed)):
            raise CheckpointError(
                f"{path} asks for {part} {made_by[part]['class_path']!r}, which is no {of_this_kind.__name__} of this "
                "zoo, and to import it would run it; nothing was loaded. If it is yours, and you trust this file, "
                f"name it: --{part} {made_by[part]['class_path']}"
            )
        for class_path in _class_paths(made_by.get(part, {}).get("init_args")):
            if not re.fullmatch(r"zoo\.implicit\.\w+", class_path):
                raise CheckpointError(
                    f"{path} asks for {class_path!r} among the arguments of its {part}, where only solvers and "
                    "gradients of zoo.implicit can stand; nothing was loaded"
                )
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return {
        "path": path,
        "made_by": made_by,
        "shapes": shapes,
        "step": content.get("global_step"),
        "epoch": content.get("epoch"),
        "resumable": {"loops", "optimizer_states", "lr_schedulers", "global_step"} <= content.keys(),
        "run": content.get("deq_zoo_run"),
        "loggers": content.get("deq_zoo_loggers", []),
    }


def _is_imported(choice: Mapping[str, Any], kind: type) -> bool:
    """Whether the class of a configuration is there without importing anything, and of this kind."""
    module, _, name = str(choice["class_path"]).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and issubclass(found, kind)


def _is_named(choice: Mapping[str, Any], typed: str) -> bool:
    """Whether the user names this class."""
    return re.search(rf"(?<![\w.]){re.escape(str(choice['class_path']))}(?![\w.])", typed) is not None


def _class_paths(value: Any) -> Iterator[str]:
    """All classes that a configuration names, however deep."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "class_path":
                yield str(item)
            yield from _class_paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _class_paths(item)


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


def load_content(file: Path) -> dict[str, Any]:
    """All that a checkpoint holds, every byte of it checked; CheckpointError as :func:`read_checkpoint`."""
    try:
        content = read_pickle(file, kind="checkpoint", only_zip=True)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a Lightning checkpoint")
    return content

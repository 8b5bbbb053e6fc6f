"""All weights of a model from a file, whichever program of ours or of the original authors wrote it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import zoo
from zoo.weight_files import read_weights

from .checkpoints import CheckpointError, read_checkpoint

_MODEL = "model."  # how the keys of a task's model begin in its checkpoints


def load_weights(model: nn.Module, path: str) -> None:
    """Give a model all its weights from a file.

    Args:
        model: which is changed in place.
        path: a ``.ckpt`` file of a run, a ``.safetensors`` file that ``zoo.save_weights`` wrote, or a file that
            ``zoo.load_original`` reads.

    Raises:
        CheckpointError: there is no such file, or its weights are not those of the model; the message lists what
            differs.
        WeightsError, ValueError: it cannot be read, or does not fit the model's arguments.
    """
    state = _read(path, model)
    ours = model.state_dict()
    differences = [
        f"{name}: {_shape(state, name)} in the file, {_shape(ours, name)} in the model"
        for name in sorted(state.keys() | ours.keys())
        if _shape(state, name) != _shape(ours, name)
    ]
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"the weights in {path} are of another model than the one asked for: {'; '.join(differences[:5])}{more}. "
            "Ask for the model, and the model_args, that the file was made with"
        )
    model.load_state_dict(state)


def _read(path: str, model: nn.Module) -> dict[str, Tensor]:
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"weights_from takes a file; there is none at {path}")
    if file.suffix == ".ckpt":
        read_checkpoint(path)  # every byte of it checked
        state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        return {key.removeprefix(_MODEL): value for key, value in state.items() if key.startswith(_MODEL)}
    if file.suffix == ".safetensors":
        spec, state = read_weights(file)
        if spec is not None:
            return state
    # What no shape tells, as how wide a window of the correlation is, the model says.
    arguments = {key: value for key, value in zoo.spec_of(model).arguments.items() if key not in ("solver", "gradient")}
    return zoo.load_original(path, **arguments).state_dict()


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(state[name].shape) if name in state else "absent"

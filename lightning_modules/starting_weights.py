"""All weights of a model from a file, whichever program of ours or of the original authors wrote it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

import zoo
from zoo.originals.common import problems
from zoo.pickles import is_pickle
from zoo.reading import state_of_checkpoint
from zoo.weight_files import read_weights
from zoo.weights import is_source

from .checkpoints import CheckpointError, load_content


def load_weights(model: nn.Module, path: str) -> None:
    """Give a model all its weights from a file.

    Args:
        model: which is changed in place.
        path: a ``.ckpt`` file of a run, a ``.safetensors`` file that ``zoo.save_weights`` wrote, a file that
            ``zoo.load_original`` reads, or what else ``zoo.load_pretrained`` takes.

    Raises:
        CheckpointError: there is no such file, or its weights are not those of the model; the message lists what
            differs.
        WeightsError, ValueError: it cannot be read, or does not fit the model's arguments.
    """
    state = _read(path, model)
    if different := problems(state, model.state_dict()):
        raise CheckpointError(
            f"the weights in {path} are of another model than the one asked for: in it {different}. Ask for the "
            "model, and the model_args, that the file was made with"
        )
    model.load_state_dict(state)


def _read(path: str, model: nn.Module) -> dict[str, Tensor]:
    file = Path(path)
    if not file.is_file():
        if is_source(path):
            return zoo.load_pretrained(path).state_dict()
        raise CheckpointError(f"weights_from takes a file; there is none at {path}")
    if file.suffix == ".ckpt":
        return state_of_checkpoint(load_content(file), path)
    if not is_pickle(file):
        spec, state = read_weights(file)
        if spec is not None:
            return state
    # What no shape tells, as how wide a window of the correlation is, the model says.
    arguments = {key: value for key, value in zoo.spec_of(model).arguments.items() if key not in ("solver", "gradient")}
    return zoo.load_original(path, **arguments).state_dict()

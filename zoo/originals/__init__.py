"""Checkpoints that the original authors published, as models of the zoo."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from zoo.errors import WeightsError
from zoo.pickles import is_pickle, read_pickle, refuse_hollow
from zoo.weight_files import read_weights

from . import flow, mdeq, transformer
from .common import UnusedWeightsWarning

__all__ = ["UnusedWeightsWarning", "load_original"]


class _Family(NamedTuple):
    marks: tuple[str, ...]  # how keys begin that only its checkpoints have
    load: Callable[[dict[str, Tensor], str, dict[str, Any]], nn.Module]


_FAMILIES = {
    "MDEQ": _Family(mdeq.MARKS, mdeq.load),
    "DEQ transformer": _Family(transformer.MARKS, transformer.load),
    "DEQ-Flow": _Family(flow.MARKS, flow.load),
}
_WRAPPERS = re.compile(r"^(?:(?:module|model)\.)+")  # of DataParallel, and of a model with its loss
_OWN = "deq.cell."  # how keys of the zoo's own models begin


def load_original(source: str | os.PathLike[str] | Mapping[str, Any], **overrides: Any) -> nn.Module:
    """A model with the weights of a checkpoint that the original authors published, in eval mode and on the CPU.

    Family and sizes are read off the checkpoint's keys and shapes, and every weight is taken from it: what it lacks,
    what it has besides, and what has another shape is an error. Known are the formats of MDEQ (locuslab/mdeq,
    locuslab/deq MDEQ-Vision and torchdeq), of the DEQ transformer (locuslab/deq DEQ-Sequence, before and since 2021,
    and torchdeq's deq-seq and deq-lm) and of DEQ-Flow (locuslab/deq-flow, versions 1 and 2, and torchdeq): the state
    dict by itself or under the key ``"state_dict"`` of a training checkpoint, with or without the prefixes ``module.``
    and ``model.``, with or without the copies of the cell that older code stored.

    What no shape tells is that of the registered model that has these sizes, which then is the model's name. Other
    sizes are a generic model, with that model's defaults.

    Not in an MDEQ checkpoint are ``stem_stride``, ``mean``, ``std``, ``dropout``, ``groups`` and the like. Registered
    sizes count whatever their ``num_classes`` (``mdeq_large`` is the name for ``mdeq_large_reg`` too: they differ in
    ``dropout`` only). The generic ones are ``"mdeq"`` and ``"mdeq_segmenter"``; their images are not normalised unless
    ``mean`` and ``std`` say how.

    Not in the checkpoint of a DEQ transformer are the vocabulary, ``memory_length``, ``attention_span``, the dropouts,
    and whether it is post-LN or pre-LN: it is taken for post-LN unless ``norm="pre"`` is given. The generic one is
    ``"deq_transformer"``. Weights that the published code ties are one here, and have to be equal in the checkpoint.

    Not in a DEQ-Flow checkpoint are ``padding`` and ``all_grad``; the values of a look-up are taken for those of 4
    levels where they can be. Registered sizes count whatever their ``head_width`` (version 1 has it narrower),
    ``mask_width`` and ``gma``. The generic one is ``"deq_flow"``. Any convolution may be stored with weight
    normalisation or without; ``weight_norm=False`` multiplies it out.

    RAFT (torchvision's raft_large, or princeton-vl/RAFT) is loaded as a DEQ-Flow to fine-tune: its cell is the same,
    and is put into the form with weight normalisation. What DEQ-Flow has no place for is told by an
    :class:`UnusedWeightsWarning`; raft_small is refused, since it has other layers.

    Args:
        source: a file of ``torch.save``, of which no code is run, or of safetensors; or what such a file holds. It is
            copied, in the default dtype.
        overrides: arguments of the model, as :func:`zoo.create_model` takes them. ``solver`` and ``gradient`` can be
            anything; none may change the shapes.

    Raises:
        WeightsError: the file cannot be read, is no checkpoint, or has more in it than weights; its family is not
            known; a key is missing, unknown, or has another shape; stored copies of a weight differ.
        ValueError: an override does not exist or does not fit the checkpoint; ``stem_stride`` is needed and not given.
        TypeError: ``source`` is neither a path nor a mapping.

    Example:
        >>> model = zoo.load_original("MDEQ_XL_Cls.pkl", solver=Broyden(tol=1e-4, max_steps=40))
        >>> zoo.save_weights(model, "mdeq_xl_imagenet.safetensors")
    """
    if isinstance(source, Mapping):
        where: str = "the given mapping"
        loaded: object = source
    elif isinstance(source, str | os.PathLike):
        where, loaded = os.fspath(source), read_original(Path(source).expanduser())
    else:
        raise TypeError(
            f"load_original takes a path or a state dict; given: {type(source).__name__}. Of a module, give its "
            "state_dict()"
        )
    return make_original(loaded, where, overrides)


def make_original(loaded: object, where: str, overrides: dict[str, Any]) -> nn.Module:
    """The model of what a file holds; see :func:`load_original`.

    Args:
        loaded: a state dict, or what it is in.
        where: it comes from, for messages.
        overrides: arguments of the model.
    """
    state = _state_dict(loaded, where)
    if any(key.startswith(_OWN) for key in state):
        of_lightning = isinstance(loaded, Mapping) and "pytorch-lightning_version" in loaded
        raise WeightsError(
            f"{where} was written by this zoo, not by the original authors. "
            + (
                "Load this Lightning checkpoint with the class that made it, like ImageClassifier.load_from_checkpoint,"
                " or only its model with zoo.load_pretrained"
                if of_lightning
                else "Load shipped weights with zoo.load_pretrained, and a state dict with model.load_state_dict"
            )
        )
    for family in _FAMILIES.values():
        if any(key.startswith(family.marks) for key in state):
            return family.load(state, where, overrides)
    raise WeightsError(
        f"{where} is of no family that load_original knows ({', '.join(_FAMILIES)}): its {len(state)} keys are like "
        f"{', '.join(map(repr, list(state)[:3]))}"
    )


def read_original(path: str | os.PathLike[str], *, check: Callable[[bytes | bytearray], None] | None = None) -> object:
    """What a file holds: tensors and plain data.

    Args:
        path: of what ``torch.save`` wrote, or of safetensors.
        check: see :func:`zoo.pickles.read_pickle`.

    Raises:
        WeightsError: it cannot be read, is damaged, or has more in it than that.
    """
    if not is_pickle(path):
        return read_weights(path, check=check)[1]
    loaded = read_pickle(path, check=check)
    found = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if isinstance(found, Mapping):
        refuse_hollow({str(key): value for key, value in found.items() if isinstance(value, Tensor)}, os.fspath(path))
    return loaded


def _state_dict(loaded: object, where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names, without the prefixes of what was wrapped around the model."""
    found = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(found, Mapping):
        raise WeightsError(
            f"{where} holds no state dict, that is a mapping of names to tensors, by itself or under 'state_dict'; "
            f"found: {type(found).__name__}"
        )
    if not found:
        raise WeightsError(f"{where} is empty: it has no weights")
    state: dict[str, Tensor] = {}
    for key, value in found.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            hint = f". If that is the state dict, give load_original what stands there, x[{key!r}]"
            raise WeightsError(
                f"{where} is no state dict, that is a mapping of names to tensors, and has none under 'state_dict': "
                f"its {key!r} is of type {type(value).__name__}" + (hint if isinstance(value, Mapping) else "")
            )
        name = _WRAPPERS.sub("", key)
        if name in state:
            raise WeightsError(f"{where} has two tensors for {name!r}, which differ in the prefix; one is {key!r}")
        state[name] = value
    return state

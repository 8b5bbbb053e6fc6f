"""Pretrained weights: one line brings a model from any source, and every byte is verified before it is used."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import nn

from .errors import ReinitializedWarning
from .filling import fill, keys_of_other_classes, refuse_misfits, without_memory
from .locating import TORCHVISION, find, is_source
from .reading import ForeignWeightsError, read
from .records import ORIGINAL
from .registry import create_model

__all__ = ["ForeignWeightsError", "is_source", "load_pretrained"]


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
    if name.startswith(TORCHVISION):
        from .originals.raft import load_raft

        return load_raft(name, cache_dir, offline, sha256, overrides)
    found = find(name, cache_dir, offline, sha256)
    where = found.where
    if found.record is not None and found.record.source == ORIGINAL:
        from .originals.recorded import read_recorded

        spec, state = read_recorded(found, found.record)
    else:
        spec, state = read(found, averaged=averaged)
    if overrides and found.record is None:
        refuse_misfits(without_memory(spec, {}, state, where), state, [], where, {})  # what it says of itself, first
    if found.record is not None and found.record.source != ORIGINAL:
        # What ships is known to fit into memory, and first use of torch's meta device takes a second or two.
        model = create_model(spec.model, **{**spec.arguments, **overrides})
    else:
        model = without_memory(spec, overrides, state, where)
    fresh = keys_of_other_classes(model, state, overrides.get("num_classes"))
    refuse_misfits(model, state, fresh, where, overrides)
    if fresh:
        warnings.warn(
            f"{where} was trained for {len(state[fresh[0]])} classes, and {overrides['num_classes']} were asked for: "
            f"{', '.join(fresh)} start at random",
            ReinitializedWarning,
            stacklevel=2,
        )
    return fill(model, {key: value for key, value in state.items() if key not in fresh}, fresh).eval()

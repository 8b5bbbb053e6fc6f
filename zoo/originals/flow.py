"""DEQ-Flow checkpoints, and RAFT's as starting points: their keys, and the sizes that their shapes tell.

Formats of DEQ-Flow: version 1, whose mask predictor is a part of the update block; version 2 and, with the same keys,
TorchDEQ's. Formats of RAFT, which iterates the same cell from another start: torchvision's raft_large, and
princeton-vl/RAFT, whose keys are those of version 1.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import WeightsError
from zoo.flow import SIZES, DEQFlow

from .common import Checkpoint, UnusedWeightsWarning

MARKS = ("update_block.encoder.", "update_block.motion_encoder.")
"""How keys of the cell begin."""

_GENERIC = "deq_flow"  # the name of what is no registered size
_WHAT_MAKES_A_SIZE = {"hidden", "feature_width", "encoder_widths", "corr_widths", "flow_widths", "motion_width"}
_BLOCK = "deq.cell.update_block"
_NORMALISED = re.compile(r"^update_block\.(?!mask\.).*\.weight$")  # where the model has weight_norm

_NAMES = (
    (r"^feature_encoder\.", "fnet."),
    (r"^context_encoder\.", "cnet."),
    (r"^([fc]net)\.conv\.", r"\1.conv2."),
    (r"convnormrelu(\d?)\.0\.", lambda found: f"conv{found[1] or 1}."),
    (r"convnormrelu(\d?)\.1\.", lambda found: f"norm{found[1] or 1}."),
    (r"^deq\.cell\.aggregate\.", "update_block.gma."),
    (r"^attention\.", "attn."),
    (r"^deq\.cell\.", ""),
    (r"\.motion_encoder\.conv(corr|flow)(\d)\.0\.", lambda found: f".encoder.conv{found[1][0]}{found[2]}."),
    (r"\.motion_encoder\.conv\.0\.", ".encoder.conv."),
    (r"\.recurrent_block\.convgru(\d)\.conv([zrq])\.", r".gru.conv\2\1."),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)


def original_names(key: str, *, version: int = 2) -> list[str]:
    """What locuslab/deq-flow calls the tensor ``key`` of a model's state dict; two names where it stores it twice."""
    mask = "update_block.mask" if version == 1 else "mask"
    key = re.sub(r"^mask_predictor\.convrelu\.0\.", f"{mask}.0.", key)
    key = re.sub(r"^mask_predictor\.conv\.", f"{mask}.2.", key)
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    shortcut = re.sub(r"^(cnet\.layer\d\.\d)\.downsample\.1\.", r"\1.norm3.", key)
    return [key] if shortcut == key else [key, shortcut]


def torchvision_name(key: str) -> str:
    """What torchvision's raft_large calls the tensor ``key`` of a model's state dict."""
    key = re.sub(r"\.parametrizations\.weight\.original0$", ".weight_g", key.removeprefix("deq.cell."))
    return re.sub(r"\.parametrizations\.weight\.original1$", ".weight_v", key)


def load(state: dict[str, Tensor], where: str, overrides: dict[str, Any]) -> nn.Module:
    """The model of a state dict without wrappers; see :func:`zoo.load_original`."""
    of_torchvision = any(key.startswith(MARKS[1]) for key in state)
    version = 1 if any(key.startswith("update_block.mask.") for key in state) else 2

    def names_of(key: str) -> list[str]:
        return [torchvision_name(key)] if of_torchvision else original_names(key, version=version)

    checkpoint = Checkpoint(state, where, "a DEQ-Flow model")
    _refuse_small(checkpoint)
    sizes = _sizes(checkpoint, lambda key: names_of(key)[0], overrides)
    unused = None
    if checkpoint.shape(names_of("context_encoder.conv.weight")[0])[0] == 2 * sizes["hidden"]:
        unused = _drop_start(state := dict(state), names_of("context_encoder.conv.weight")[0], sizes["hidden"])
        sizes["weight_norm"] = True  # as DEQ-Flow is trained on; it changes nothing in what is loaded
    weight_norm = overrides.get("weight_norm", sizes["weight_norm"])
    checkpoint = Checkpoint(_stored(state, weight_norm=weight_norm), where, checkpoint.family)
    name = _name(sizes)
    model = checkpoint.create(name, {**SIZES[name], **sizes}, overrides)
    names = {name: key for key in model.state_dict() for name in names_of(key)}
    told = {key: value for key, value in overrides.items() if key in sizes and key != "weight_norm"}
    model = checkpoint.fill(model, names, sizes, told)
    if unused is not None:
        warnings.warn(
            f"{where} is of RAFT, which starts its hidden state at a part of the context encoder's output: "
            f"{unused} are not used, since DEQ-Flow starts at 0. All else of it is, and no weight of the model is "
            "random; but RAFT was trained to be good after 12 updates or so, not at its equilibrium: fine-tune it",
            UnusedWeightsWarning,
            stacklevel=4,
        )
    return model


def _refuse_small(checkpoint: Checkpoint) -> None:
    """Raise WeightsError where the checkpoint is of RAFT's small model."""
    found = [
        part for part in ("convnormrelu3.", "conv3.") if any(f"layer1.0.{part}" in key for key in checkpoint.state)
    ]
    if found:
        raise WeightsError(
            f"{checkpoint.where} is of raft_small: its encoders have bottleneck blocks (layer1.0.{found[0]}*), it has "
            "one convolution for the correlation, one pass of its GRU and no mask to upsample by, so that DEQ-Flow has "
            "no place for its weights. Take raft_large, whose cell is DEQ-Flow's"
        )


def _sizes(checkpoint: Checkpoint, name_of: Callable[[str], str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model that the shapes tell."""

    def shape(layer: str) -> tuple[int, ...]:
        return checkpoint.shape(name_of(f"{layer}.weight"))

    motion = f"{_BLOCK}.motion_encoder"
    first = [f"layer{i}.0.convnormrelu1.0" for i in (1, 2, 3)]
    levels, radius = _window(checkpoint, shape(f"{motion}.convcorr1.0")[1], overrides)
    return {
        "hidden": shape(f"{_BLOCK}.recurrent_block.convgru1.convz")[0],
        "feature_width": shape("feature_encoder.conv")[0],
        "encoder_widths": tuple(shape(f"feature_encoder.{layer}")[0] for layer in ("convnormrelu.0", *first)),
        "corr_widths": tuple(shape(f"{motion}.convcorr{i}.0")[0] for i in (1, 2)),
        "flow_widths": tuple(shape(f"{motion}.convflow{i}.0")[0] for i in (1, 2)),
        "motion_width": shape(f"{motion}.conv.0")[0] + 2,
        "head_width": shape(f"{_BLOCK}.flow_head.conv1")[0],
        "mask_width": shape("mask_predictor.convrelu.0")[0],
        "corr_levels": levels,
        "corr_radius": radius,
        "gma": any(key.startswith("update_block.gma.") for key in checkpoint.state),
        "weight_norm": any(_NORMALISED.match(key.removesuffix("_v")) for key in checkpoint.state if key[-2:] == "_v"),
    }


def _window(checkpoint: Checkpoint, channels: int, overrides: Mapping[str, Any]) -> tuple[int, int]:
    """Levels L and radius r with L (2r + 1)^2 channels: ``overrides`` may choose, else the L nearest to 4."""
    fitting = [
        (channels // (2 * r + 1) ** 2, r)
        for r in range(1, int(channels**0.5) // 2 + 1)
        if channels % (2 * r + 1) ** 2 == 0
    ]
    if not fitting:
        raise WeightsError(
            f"{checkpoint.where} looks up {channels} values of the correlation, which is no number of levels times a "
            "window of (2r + 1)^2 places"
        )
    asked = [
        (L, r) for L, r in fitting if overrides.get("corr_levels", L) == L and overrides.get("corr_radius", r) == r
    ]
    return min(asked or fitting, key=lambda window: abs(window[0] - 4))


def _drop_start(state: dict[str, Tensor], weight: str, hidden: int) -> str:
    """Take RAFT's initial hidden state out of the context encoder's last layer; in words, what that was."""
    layer = weight.removesuffix(".weight")
    for name in (weight, f"{layer}.bias"):
        if name in state:
            state[name] = state[name][hidden:]
    return f"the first {hidden} rows of {layer}.weight and {layer}.bias"


def _stored(state: Mapping[str, Tensor], *, weight_norm: bool) -> dict[str, Tensor]:
    """Each weight in the way in which the model has it: W, or g and V with W = V g / ||V||."""
    stored = dict(state)
    for name in {re.sub(r"_[gv]$", "", key) for key in state if re.search(r"\.weight(_[gv])?$", key)}:
        g, V = f"{name}_g", f"{name}_v"
        normalised = weight_norm and _NORMALISED.match(name) is not None
        if normalised and name in stored and stored[name].dim() == 4:
            W = stored.pop(name)
            norm = _norm(W)
            stored[g], stored[V] = norm, torch.where(norm > 0, W, 1)  # a W of 0 has no direction
        elif not normalised and stored.keys() >= {g, V} and stored[g].shape == _norm(stored[V]).shape:
            stored[name] = stored.pop(V) * (stored[g] / _norm(state[V]))
            del stored[g]
    return stored


def _norm(W: Tensor) -> Tensor:
    """Of each output channel: ``(O, I, h, w)`` -> ``(O, 1, 1, 1)``."""
    norm: Tensor = torch.linalg.vector_norm(W, dim=tuple(range(1, W.dim())), keepdim=True)
    return norm


def _name(sizes: Mapping[str, Any]) -> str:
    """The registered model of these sizes; the generic one if there is none."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(DEQFlow).parameters.items()}
    wanted = {key: value for key, value in sizes.items() if key in _WHAT_MAKES_A_SIZE}
    fitting = (
        name for name, size in SIZES.items() if name != _GENERIC and {**defaults, **size}.items() >= wanted.items()
    )
    return next(fitting, _GENERIC)

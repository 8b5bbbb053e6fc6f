"""MDEQ checkpoints: their keys, and the sizes that their shapes tell.

Three formats, of one network: locuslab/deq (MDEQ-Vision); locuslab/mdeq, which stored the cell four times
(``fullstage``, ``deq.func``, and a copy without weight normalisation, ``fullstage_copy``, ``deq.func_copy``); and
torchdeq (``full_stage``), which normalises other convolutions.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.mdeq import CLASSIFIERS, MDEQ, PARTS, SEGMENTERS, MDEQSegmenter
from zoo.registry import create_model
from zoo.weights import WeightsError

MARKS = ("fullstage.", "full_stage.")
"""How keys of the cell begin."""

_GENERIC = ("mdeq", "mdeq_segmenter")  # the names of what is no registered size
_STAGES = {"branches": "branches", "fuse": "fuse_layers", "post": "post_fuse_layers"}
_COPY = "fullstage_copy."
_ALIASES = {"deq.func.": "fullstage.", "deq.func_copy.": _COPY}  # stored twice, the same
_SIZES = {"channels", "in_channels", "head_widths", "final_width", "expansion"}  # what makes a registered model
_NOT_OF_THE_MODEL = {"loss.criterion.weight"}  # the weights of the classes, which Cityscapes' loss holds

_NAMES = (
    (r"^stem\.([0134])\.", r"downsample.\1."),
    (r"^stem\.6\.", "stage0.0."),
    (r"^stem\.7\.", "stage0.1."),
    (r"^deq\.cell\.branches\.(\d+)\.", r"fullstage.branches.\1.blocks.0."),
    (r"^(fullstage\.branches\..*)\.norm(\d)\.", r"\1.gn\2."),
    (r"^deq\.cell\.post\.(\d+)\.1\.", r"fullstage.post_fuse_layers.\1.conv."),
    (r"^deq\.cell\.post\.(\d+)\.2\.", r"fullstage.post_fuse_layers.\1.gnorm."),
    (r"^head\.widen\.(\d+)\.", r"incre_modules.\1.0."),
    (r"^head\.down\.", "downsamp_modules."),
    (r"^head\.final\.", "final_layer."),
    (r"^head\.mix\.", "last_layer."),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)
_FUSE = re.compile(r"^deq\.cell\.fuse\.(\d+)\.(\d+)\.(\d+)\.")


def original_name(key: str, *, segmenter: bool) -> str:
    """What locuslab/deq calls the tensor ``key`` of a model's state dict."""
    if match := _FUSE.match(key):
        i, j, layer = map(int, match.groups())
        step = "" if j > i else f"{layer // 3}."  # downwards there are several, each of a convolution, GN and ReLU
        kind = ("conv", "gnorm")[layer % 3]
        key = f"fullstage.fuse_layers.{i}.{j}.net.{step}{kind}.{key[match.end() :]}"
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    return re.sub(r"^head\.classifier\.", "last_layer.3." if segmenter else "classifier.", key)


def load(state: dict[str, Tensor], where: str, overrides: dict[str, Any]) -> nn.Module:
    """The model of a state dict without wrappers; see :func:`zoo.load_original`."""
    state = {re.sub(r"^full_stage\.", "fullstage.", key): value for key, value in state.items()}
    state = _without_copies({key: value for key, value in state.items() if key not in _NOT_OF_THE_MODEL}, where)
    segmenter = any(key.startswith("last_layer.") for key in state)
    sizes = _sizes(state, where, segmenter=segmenter)
    name, preset = _preset(sizes, segmenter=segmenter)
    if name in _GENERIC and "stem_stride" not in overrides and "stage0.0.weight" in state:
        raise ValueError(
            f"{where} has the sizes of no registered model, and no shape tells how much smaller than the image its "
            "highest resolution is: give load_original(..., stem_stride=1, 2 or 4), and mean= and std= of its images"
        )
    with torch.device("meta"):  # nothing is drawn that is overwritten
        model = _create(name, {**preset, **sizes}, overrides, where)
    shapes = model.state_dict()
    names = {original_name(key, segmenter=segmenter): key for key in shapes}
    expected = {name: shapes[key] for name, key in names.items()}
    if problems := _problems(state, expected):
        if told := [f"{key}={value!r}" for key, value in overrides.items() if key in {*sizes, "stem_stride"}]:
            read = ", ".join(f"{key}={value!r}" for key, value in sizes.items())
            raise ValueError(
                f"{where} does not fit a model with {', '.join(told)}: in it {problems}. Read off it are {read}, which "
                "need not be given"
            )
        raise WeightsError(f"{where} is no complete checkpoint of an MDEQ model: in it {problems}")
    own = {
        names[key]: torch.empty(value.shape, dtype=value.dtype, device="cpu").copy_(state[key].detach())
        for key, value in expected.items()
    }
    model.load_state_dict(own, assign=True)
    return model.eval()


def _create(name: str, arguments: dict[str, Any], overrides: dict[str, Any], where: str) -> nn.Module:
    try:
        return create_model(name, **{**arguments, **overrides})
    except ValueError as error:
        if overrides:
            raise
        raise WeightsError(f"{where} has sizes that no MDEQ model has: {error}") from None


def _without_copies(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The cell once. Its copies have to be complete; those that are the same tensors have to be equal."""
    for alias, source in _ALIASES.items():
        copies, kept = _below(alias, state), _below(source, state)
        _check_names(alias, copies, source, kept, where)
        for name, value in copies.items():
            if not torch.equal(value, kept[name]):
                raise WeightsError(
                    f"{where} has two different values for one weight: {alias}{name} and {source}{name}; nothing was "
                    "loaded, since it is not known which was trained"
                )
    # What is left is a copy with the product of weight normalisation in it, which training updates one step late: its
    # values are not asked to be equal.
    cell = _below("fullstage.", state).items()
    plain = {re.sub(r"\.weight_v$", ".weight", name): value for name, value in cell if not name.endswith(".weight_g")}
    copies = _below(_COPY, state)
    _check_names(_COPY, copies, "fullstage.", plain, where)
    for name, value in copies.items():
        if value.shape != plain[name].shape:
            raise WeightsError(
                f"{where} has shape {tuple(value.shape)} for {_COPY}{name}, and {tuple(plain[name].shape)} for that of "
                "fullstage, of which it is a copy"
            )
    return {key: value for key, value in state.items() if not key.startswith((*_ALIASES, _COPY))}


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _check_names(copy: str, copies: Collection[str], source: str, names: Collection[str], where: str) -> None:
    """Raise WeightsError where there is a copy, and not of all."""
    if copies and (different := set(copies) ^ set(names)):
        raise WeightsError(
            f"{where} has a copy of {source}* in {copy}* that is not complete: {len(different)} names are in one of "
            f"them only, like {min(different)!r}"
        )


def _sizes(state: Mapping[str, Tensor], where: str, *, segmenter: bool) -> dict[str, Any]:
    """The arguments of a model that the shapes tell."""

    def shape(key: str) -> tuple[int, ...]:
        for name in (key, f"{key}_v"):
            if name in state:
                if state[name].dim() < 2 or not state[name].numel():
                    raise WeightsError(f"{where} has shape {tuple(state[name].shape)} for {name}, which is no weight")
                return tuple(state[name].shape)
        raise WeightsError(
            f"{where} is no complete checkpoint of an MDEQ model: {key!r} is missing, with {key + '_v'!r}"
        )

    n = len({key.split(".")[2] for key in state if key.startswith("fullstage.branches.")})
    inner = [shape(f"fullstage.branches.{i}.blocks.0.conv1.weight") for i in range(max(n, 1))]
    sizes = {
        "channels": tuple(C for _, C, *_ in inner),
        "in_channels": shape("downsample.0.weight")[1],
        "expansion": inner[0][0] // inner[0][1],
        "post_affine": any(re.match(r"fullstage\.post_fuse_layers\.\d+\.gnorm\.", key) for key in state),
        "weight_norm": tuple(part for part in PARTS if _is_normalised(_STAGES[part], state)),
    }
    if segmenter:
        return {**sizes, "num_classes": shape("last_layer.3.weight")[0]}
    return {
        **sizes,
        "head_widths": tuple(shape(f"incre_modules.{i}.0.conv1.weight")[0] for i in range(n)),
        "final_width": shape("final_layer.0.weight")[0],
        "num_classes": shape("classifier.weight")[0],
    }


def _is_normalised(stage: str, state: Iterable[str]) -> bool:
    return any(key.startswith(f"fullstage.{stage}.") and key.endswith(".weight_g") for key in state)


def _preset(sizes: Mapping[str, Any], *, segmenter: bool) -> tuple[str, dict[str, Any]]:
    """The registered model of these sizes and its arguments; the generic one, and none, if there is none."""
    generic, presets, builder = (
        ("mdeq_segmenter", SEGMENTERS, MDEQSegmenter) if segmenter else ("mdeq", CLASSIFIERS, MDEQ)
    )
    defaults = {name: parameter.default for name, parameter in inspect.signature(builder).parameters.items()}
    fixed = {key: value for key, value in sizes.items() if key in _SIZES}
    fitting = [
        name for name, preset in presets.items() if name != generic and {**defaults, **preset}.items() >= fixed.items()
    ]
    if not fitting:
        return generic, {}
    # The post_affine of a checkpoint chooses between two, but is no reason to take none.
    name = min(fitting, key=lambda name: {**defaults, **presets[name]}["post_affine"] != sizes["post_affine"])
    return name, presets[name]


def _problems(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What is wrong with a checkpoint, in words; nothing where all is well."""
    found = []
    if unknown := [key for key in state if key not in expected]:
        named = []
        for key in unknown[:3]:
            close = difflib.get_close_matches(key, expected, n=1)
            named.append(repr(key) + (f" (near {close[0]!r})" if close else ""))
        found.append(f"{_count(unknown, 'key is', 'keys are')} unknown: {_list(named, unknown)}")
    if missing := [key for key in expected if key not in state]:
        found.append(f"{_count(missing, 'key is', 'keys are')} missing: {_list(map(repr, missing[:3]), missing)}")
    wrong = [key for key, value in expected.items() if key in state and not _fits(state[key], value)]
    if wrong:
        named = [f"{key!r} is {_kind(state[key])} and should be {_kind(expected[key])}" for key in wrong[:3]]
        found.append(f"{_count(wrong, 'key has', 'keys have')} another shape or kind: {_list(named, wrong)}")
    return "; ".join(found)


def _fits(value: Tensor, expected: Tensor) -> bool:
    return value.shape == expected.shape and value.is_floating_point() == expected.is_floating_point()


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _count(keys: list[str], one: str, many: str) -> str:
    return f"{len(keys)} {one if len(keys) == 1 else many}"


def _list(named: Iterable[str], keys: list[str]) -> str:
    named = list(named)
    return ", ".join(named) + (f" and {len(keys) - len(named)} more" if len(keys) > len(named) else "")

"""MDEQ checkpoints: their keys, and the sizes that their shapes tell.

Three formats, of one network: locuslab/deq (MDEQ-Vision); locuslab/mdeq, which stored the cell four times
(``fullstage``, ``deq.func``, and a copy without weight normalisation, ``fullstage_copy``, ``deq.func_copy``); and
torchdeq (``full_stage``), which normalises other convolutions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from zoo.mdeq import CLASSIFIERS, MDEQ, PARTS, SEGMENTERS, MDEQSegmenter

from .common import Checkpoint

MARKS = ("fullstage.", "full_stage.")
"""How keys of the cell begin."""

_GENERIC = ("mdeq", "mdeq_segmenter")  # the names of what is no registered size
_STAGES = {"branches": "branches", "fuse": "fuse_layers", "post": "post_fuse_layers"}
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
    state = {key: value for key, value in state.items() if key not in _NOT_OF_THE_MODEL}
    checkpoint = Checkpoint(state, where, "an MDEQ model").without_copies("fullstage.", "fullstage_copy.")
    segmenter = any(key.startswith("last_layer.") for key in checkpoint.state)
    sizes = _sizes(checkpoint, segmenter=segmenter)
    name, preset = _preset(sizes, segmenter=segmenter)
    if name in _GENERIC and "stem_stride" not in overrides and "stage0.0.weight" in checkpoint.state:
        raise ValueError(
            f"{where} has the sizes of no registered model, and no shape tells how much smaller than the image its "
            "highest resolution is: give load_original(..., stem_stride=1, 2 or 4), and mean= and std= of its images"
        )
    model = checkpoint.create(name, {**preset, **sizes}, overrides)
    names = {original_name(key, segmenter=segmenter): key for key in model.state_dict()}
    told = {key: value for key, value in overrides.items() if key in {*sizes, "stem_stride"}}
    return checkpoint.fill(model, names, sizes, told)


def _sizes(checkpoint: Checkpoint, *, segmenter: bool) -> dict[str, Any]:
    """The arguments of a model that the shapes tell."""
    state, shape = checkpoint.state, checkpoint.shape
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

"""DEQ transformer checkpoints: their keys, and the sizes that their shapes tell.

Three formats: locuslab/deq (DEQ-Sequence) and, with the same keys, torchdeq's deq-seq; locuslab/deq until February
2021, which stored the cell four times (``func``, ``deq.func``, and a copy without weight normalisation, ``func_copy``,
``deq.func_copy``), the feed-forward layers as convolutions, and projections under shorter names; and torchdeq's deq-lm,
of several blocks, whose queries, keys and values lie head by head.

Post-LN and pre-LN have the same keys and shapes. torchdeq's deq-seq knows another pre-LN, which adds to what is not
normalised; none of the published files is of it.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import WeightsError
from zoo.transformer import MODELS, DEQTransformer

from .common import Checkpoint

MARKS = ("func.dec_attn.", "func.pos_ff.")
"""How keys of the cell begin."""

_GENERIC = "deq_transformer"  # the name of what is no registered size
_FREQUENCIES = "pos_emb.inv_freq"
_OF_EACH_HEAD = re.compile(r"dec_attn\.\d+\.qkv_net\.|^inject_conv\.")  # in deq-lm
_MATRIX = re.compile(r"(?:^inject_conv|_net)\.weight(?:_[gv])?$")

_NAMES = (
    (r"^vocabulary\.words\.(\d+)$", r"word_emb.emb_layers.\1.weight"),
    (r"^vocabulary\.biases\.(\d+)$", r"crit.out_layers.\1.bias"),
    (r"^vocabulary\.projections\.(\d+)$", r"word_emb.emb_projs.\1.weight"),
    (r"^vocabulary\.head_projection$", "crit.out_projs.0.weight"),
    (r"^vocabulary\.cluster_", "crit.cluster_"),
    (r"^injection\.", "inject_conv."),
    (r"^deq\.cell\.blocks\.(\d+)\.norm1\.", r"func.dec_attn.\1.ln1."),
    (r"^deq\.cell\.blocks\.(\d+)\.norm3\.", r"func.pos_ff.\1.ln."),
    (r"^deq\.cell\.blocks\.(\d+)\.attention\.", r"func.dec_attn.\1."),
    (r"^deq\.cell\.blocks\.(\d+)\.feed_forward\.inner\.", r"func.pos_ff.\1.ff1_net."),
    (r"^deq\.cell\.blocks\.(\d+)\.feed_forward\.outer\.", r"func.pos_ff.\1.ff2_net."),
    (r"^(func\.dec_attn\.\d+)\.content_bias$", r"\1.r_w_bias"),
    (r"^(func\.dec_attn\.\d+)\.position_bias$", r"\1.r_r_bias"),
    (r"^(func\.dec_attn\.\d+)\.before_output\.", r"\1.ln2."),
    (r"^(func\.dec_attn\.\d+)\.qkv\.", r"\1.qkv_net."),
    (r"^(func\.dec_attn\.\d+)\.position\.", r"\1.r_net."),
    (r"^(func\.dec_attn\.\d+)\.output\.", r"\1.o_net."),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)
_TIES = (
    (r"^vocabulary\.words\.(\d+)$", r"crit.out_layers.\1.weight"),
    (r"^vocabulary\.projections\.([1-9]\d*)$", r"crit.out_projs.\1.weight"),
)


def original_names(key: str, *, numbered: bool) -> list[str]:
    """What locuslab/deq calls the tensor ``key`` of a model's state dict; two names where it ties weights.

    Args:
        key: of a :class:`~zoo.DEQTransformer`.
        numbered: whether the blocks have numbers, as in torchdeq's deq-lm, whose ``injection`` is ``inject_conv`` here.
    """
    ties = [re.sub(pattern, name, key) for pattern, name in _TIES if re.search(pattern, key)]
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    return [key if numbered else re.sub(r"^(func\.\w+)\.0\.", r"\1.", key), *ties]


def load(state: dict[str, Tensor], where: str, overrides: dict[str, Any]) -> nn.Module:
    """The model of a state dict without wrappers; see :func:`zoo.load_original`."""
    whole = Checkpoint(state, where, "a DEQ transformer").without_copies("func.", "func_copy.")
    numbered = any(re.match(r"func\.\w+\.\d+\.", key) for key in whole.state)
    checkpoint = Checkpoint(_plain(whole.state), where, whole.family)
    sizes = _sizes(checkpoint, numbered=numbered)
    _check_frequencies(checkpoint, sizes["d_model"])
    if numbered:
        checkpoint = Checkpoint(_by_kind(checkpoint, sizes["num_heads"]), where, whole.family)
    norm = overrides.get("norm", sizes.get("norm"))
    applied = {"unrolled": 12} if norm == "sub" else {}  # as its authors do; there is nothing to solve for
    model = checkpoint.create(_name(sizes, overrides), {**applied, **sizes}, overrides)
    names = {name: key for key in model.state_dict() for name in original_names(key, numbered=numbered)}
    told = {key: value for key, value in overrides.items() if key in {*sizes, "norm", "d_head", "div_val"}}
    state = {key: value for key, value in checkpoint.state.items() if key != _FREQUENCIES}
    return Checkpoint(state, where, whole.family).fill(model, names, sizes, told)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names and shapes of locuslab/deq today, but for matrices where it has convolutions of width 1."""
    renamed = {}
    for name, value in state.items():
        key = re.sub(r"^(word_emb\.emb_projs\.\d+|crit\.out_projs\.\d+)$", r"\1.weight", name)
        key = re.sub(r"^injection\.", "inject_conv.", key)
        is_convolution = _MATRIX.search(key) and value.dim() == 3 and value.shape[2] == 1
        renamed[key] = value.squeeze(2) if is_convolution else value
    return renamed


def _by_kind(checkpoint: Checkpoint, num_heads: int) -> dict[str, Tensor]:
    """Rows that lie as (head, kind, feature) put as (kind, head, feature): all queries, all keys, all values."""

    def ordered(key: str, value: Tensor) -> Tensor:
        if not _OF_EACH_HEAD.search(key):
            return value
        if not value.dim() or len(value) % (3 * num_heads):
            raise WeightsError(
                f"{checkpoint.where} has shape {tuple(value.shape)} for {key}, which has no rows for the queries, keys "
                f"and values of {num_heads} heads"
            )
        rows: Tensor = value.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return rows

    return {key: ordered(key, value) for key, value in checkpoint.state.items()}


def _sizes(checkpoint: Checkpoint, *, numbered: bool) -> dict[str, Any]:
    """The arguments of a model that the shapes tell."""
    state, shape = checkpoint.state, checkpoint.shape
    block = ".0" if numbered else ""
    clusters = {int(match[1]) for key in state if (match := re.match(r"word_emb\.emb_layers\.(\d+)\.", key))}
    words = [shape(f"word_emb.emb_layers.{i}.weight")[:2] for i in range(len(clusters) or 1)]
    edges = list(itertools.accumulate(rows for rows, _ in words))
    d_model = shape(f"func.dec_attn{block}.qkv_net.weight")[1]
    num_heads, d_head = shape(f"func.dec_attn{block}.r_w_bias")[:2]
    sizes: dict[str, Any] = {
        "vocab_size": edges[-1],
        "cutoffs": tuple(edges[:-1]),
        "d_model": d_model,
        "num_heads": num_heads,
        "d_inner": shape(f"func.pos_ff{block}.ff1_net.weight")[0],
        "layers": len({key.split(".")[2] for key in state if key.startswith("func.dec_attn.")}) if numbered else 1,
        "weight_norm": any(key.startswith(MARKS) and key.endswith(".weight_g") for key in state),
    }
    if num_heads * d_head != d_model:
        sizes["d_head"] = d_head
    if any(re.search(r"^func\..*\.ln\d?\.", key) for key in state):
        sizes["norm"] = "sub"
    if (div_val := _div_val(d_model, [width for _, width in words])) is None:
        raise WeightsError(
            f"{checkpoint.where} has vectors of widths {', '.join(str(width) for _, width in words)} in its clusters, "
            f"and a DEQ transformer has {d_model} divided by 1, v, v^2, ... with one v"
        )
    return {**sizes, "div_val": div_val} if len(words) > 1 else sizes


def _div_val(d_model: int, widths: list[int]) -> int | None:
    """The v with which the widths are d // v^i; the default one if it is among several."""
    fitting = (v for v in (4, *range(1, d_model + 1)) if widths == [d_model // v**i for i in range(len(widths))])
    return next(fitting, None)


def _check_frequencies(checkpoint: Checkpoint, d_model: int) -> None:
    """Raise WeightsError where positions are not told as in :func:`zoo.transformer.sinusoids`."""
    if (found := checkpoint.state.get(_FREQUENCIES)) is None:
        return
    expected = 1 / 10000 ** (torch.arange(0, d_model, 2, dtype=torch.float32) / d_model)
    rounding = max(torch.finfo(kind).eps for kind in (found.dtype, expected.dtype) if kind.is_floating_point)
    if found.shape != expected.shape or not torch.allclose(found.float().cpu(), expected, rtol=4 * rounding, atol=1e-7):
        raise WeightsError(
            f"{checkpoint.where} has other frequencies in {_FREQUENCIES} than the DEQ transformer, whose are "
            f"10000^(-2i/d) for i = 0, ..., {len(expected) - 1} and d = {d_model}"
        )


def _name(sizes: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    """The registered model of these sizes; the generic one if there is none."""
    parameters = inspect.signature(DEQTransformer).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    wanted = {"norm": "post", **sizes, **{key: overrides[key] for key in ("norm",) if key in overrides}}
    del wanted["weight_norm"]
    fitting = (
        name for name, preset in MODELS.items() if name != _GENERIC and {**defaults, **preset}.items() >= wanted.items()
    )
    return next(fitting, _GENERIC)

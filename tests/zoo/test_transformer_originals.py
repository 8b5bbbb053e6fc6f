"""Published DEQ transformers: every format loads, every key lands in its place, and the function is as described."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import zoo
from tests.command_line import same
from tests.zoo.parity import MANIFESTS as MANIFESTS_FOLDER
from tests.zoo.parity import manifest
from zoo.implicit import Broyden
from zoo.originals.transformer import original_names

State = dict[str, Tensor]

SMALL: dict[str, Any] = {
    "vocab_size": 30, "cutoffs": (10, 16), "d_model": 16, "num_heads": 2, "d_inner": 12, "div_val": 2
}  # fmt: skip
NORMS: dict[str, dict[str, Any]] = {
    "post": SMALL,
    "pre": {**SMALL, "norm": "pre"},
    "sub": {**SMALL, "norm": "sub", "layers": 3, "unrolled": 12},
}
every_norm = pytest.mark.parametrize("norm", NORMS)


def random_model(**arguments: Any) -> zoo.DEQTransformer:
    """A model all of whose tensors are random."""
    model = zoo.DEQTransformer(**arguments)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5)
    return model


def frequencies(d: int) -> Tensor:
    return 1 / 10_000 ** (torch.arange(0, d, 2) / d)


def published(model: zoo.DEQTransformer) -> State:
    """A model's weights as they are published: by torchdeq's deq-lm where the norm is "sub", else by locuslab/deq."""
    numbered = hasattr(model.cell.blocks[0], "norm1")
    state: State = {"pos_emb.inv_freq": frequencies(model.vocabulary.d_model)}
    for key, value in model.state_dict().items():
        for name in original_names(key, numbered=numbered):
            if numbered and ("qkv_net" in name or "inject" in name):
                H, D = model.cell.blocks[0].attention.heads  # type: ignore[union-attr]
                rows = [(kind, head, i) for head in range(H) for kind in range(3) for i in range(D)]
                state[name.replace("inject_conv", "injection")] = value[[(k * H + h) * D + i for k, h, i in rows]]
            elif not numbered and re.search(r"(inject_conv|dec_attn\.\w+_net)\.weight", name):
                state[name] = value.unsqueeze(2)
            else:
                state[name] = value
    return state


def before_2021(state: State) -> State:
    """What locuslab/deq stored until then."""
    old = {}
    for key, value in state.items():
        name = re.sub(r"^(word_emb\.emb_projs\.\d+|crit\.out_projs\.\d+)\.weight$", r"\1", key)
        old[name] = value.unsqueeze(2) if re.search(r"pos_ff\.\w+_net\.weight", name) else value
    cell = {key.removeprefix("func."): value for key, value in old.items() if key.startswith("func.")}
    late = {
        key.replace("weight_v", "weight"): value + 0.1 for key, value in cell.items() if not key.endswith("weight_g")
    }
    named = {"func_copy.": late, "deq.func.": cell, "deq.func_copy.": late}
    return {**old, **{prefix + key: value for prefix, part in named.items() for key, value in part.items()}}


# ------------------------------------------------------------------------------------------------------ what is read


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_sizes_are_read_off_the_shapes(data: st.DataObject) -> None:
    norm = data.draw(st.sampled_from(["post", "sub"]))
    clusters = data.draw(st.integers(0, 3))
    arguments: dict[str, Any] = {
        "vocab_size": 20,
        "cutoffs": tuple(sorted(data.draw(st.sets(st.integers(1, 19), min_size=clusters, max_size=clusters)))),
        "d_model": 16,
        "num_heads": data.draw(st.integers(1, 3)),
        "d_head": data.draw(st.integers(1, 3)),
        "d_inner": data.draw(st.integers(1, 5)),
        "layers": data.draw(st.integers(1, 3)) if norm == "sub" else 1,
        "weight_norm": data.draw(st.booleans()),
        **({"norm": "sub", "unrolled": 12} if norm == "sub" else {}),
        **({"div_val": data.draw(st.sampled_from([1, 2, 4]))} if clusters else {}),
    }
    if clusters == 3 and arguments["div_val"] == 4:
        arguments["d_model"] = 64
    model = random_model(**arguments)
    state = published(model)
    wrapped = {f"module.{key}": value for key, value in state.items()} if data.draw(st.booleans()) else state
    loaded = zoo.load_original({"state_dict": wrapped} if data.draw(st.booleans()) else wrapped)
    assert zoo.spec_of(loaded) == zoo.ModelSpec("deq_transformer", arguments)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


FORMATS: dict[str, Callable[[State], State]] = {"today": lambda state: state, "before 2021": before_2021}


@pytest.mark.parametrize(("norm", "layout"), [*itertools.product(["post", "pre"], FORMATS), ("sub", "today")])
def test_there_and_back(norm: str, layout: str) -> None:
    model = random_model(**NORMS[norm])
    given = FORMATS[layout](published(model))
    names = list(given)
    loaded = zoo.load_original(given, norm=norm)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert list(given) == names


# As many parameters as ours: with tied projections counted once.
MANIFESTS = {
    "deq_transformer_wt103": ("deq_transformer_wt103", 97_691_888),
    "deq_transformer_wt103_pre2021": ("deq_transformer_wt103", 97_691_888),
    "torchdeq_deqseq_wt103": ("deq_transformer_wt103", 97_691_888),
    "torchdeq_deqlm_wt103": ("deq_lm_wt103", 97_571_288),
}
TIED_PROJECTIONS = 700 * (175 + 43 + 10)


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_manifest(name: str) -> None:
    """A tensor filled with its own number under every key: all numbers but the copies' are found, each once."""
    listed = manifest(name)
    state: State = {}
    sources = (
        ("deq.func", "func"),
        ("crit.out_layers", "word_emb.emb_layers"),
        ("crit.out_projs", "word_emb.emb_projs"),
    )
    for number, (key, entry) in enumerate(listed["state_dict"].items()):
        source = key
        if not key.endswith("bias") or key.startswith("deq"):
            for copy, original in sources:
                source = source.replace(copy, original) if "out_projs.0" not in key else source
        value = torch.tensor(number, dtype=getattr(torch, entry["dtype"])).expand(entry["shape"])
        state[key] = state[source] if source != key else value
    state["pos_emb.inv_freq"] = frequencies(700)
    model = zoo.load_original(state)
    registered, count = MANIFESTS[name]
    assert zoo.spec_of(model).model == registered
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert listed["n_params"] - count in (0, TIED_PROJECTIONS)
    kept = {key: value for key, value in state.items() if not re.match(r"deq\.|func_copy\.|pos_emb\.", key)}
    landed = {}
    for value in model.state_dict().values():
        number = value.reshape(-1)[0]
        assert bool((value == number).all())
        landed[int(number)] = math.prod(value.shape)
    assert landed == {int(value.reshape(-1)[0]): value.numel() for value in kept.values()}
    assert len(model.state_dict()) == len(landed)


def test_the_manifests_are_all_that_there_are() -> None:
    manifest("deq_transformer_wt103")  # or skip
    names = [
        file.stem for pattern in ("deq_tr*", "torchdeq_deq[sl]*") for file in MANIFESTS_FOLDER.glob(f"{pattern}.json")
    ]
    assert set(names) == set(MANIFESTS)


def test_pre_ln_has_to_be_said() -> None:
    listed = manifest("deq_transformer_wt103")
    state = {key: torch.zeros(()).expand(entry["shape"]) for key, entry in listed["state_dict"].items()}
    del state["pos_emb.inv_freq"]
    spec = zoo.spec_of(zoo.load_original(state, norm="pre", memory_length=300))
    assert (spec.model, spec.arguments["norm"]) == ("deq_transformer_pre_wt103", "pre")
    assert (spec.arguments["memory_length"], spec.arguments["dropout"]) == (300, 0.05)


def test_parameter_counts() -> None:
    for name, count in {*MANIFESTS.values(), ("deq_transformer_pre_wt103", 97_691_888)}:
        with torch.device("meta"):
            model = zoo.create_model(name)
        assert sum(parameter.numel() for parameter in model.parameters()) == count


# -------------------------------------------------------------------------------------------------------- the function


def described(state: State, norm: str, z: Tensor, z0: Tensor, e: Tensor, H: int, i: str = "") -> Tensor:
    """A block as reference/architectures.md, section 3, describes it, with weights in their published layout.

    z ``(B, q, d)``, z0 ``(B, m, d)``, embeddings e ``(B, m + q, d)``, of the memory too; ``i`` is the block's number.
    """

    def weight(layer: str) -> Tensor:
        v, g = (state[f"func.{layer}.weight_{kind}"].flatten(1) for kind in "vg")
        return v * (g / v.norm(dim=1, keepdim=True))

    def norm_of(x: Tensor, name: str) -> Tensor:
        affine = [state[f"func.{name}.{kind}"] for kind in ("weight", "bias")] if norm == "sub" else []
        return F.layer_norm(x, x.shape[-1:], *affine)

    att, ff = f"dec_attn{i}", f"pos_ff{i}"
    injection = "injection" if norm == "sub" else "inject_conv"
    q, m, k = z.shape[1], z0.shape[1], e.shape[1]
    c = torch.cat([z0, z], dim=1)
    if norm != "post":
        c = norm_of(c, f"{att}.ln1")
    rows = c @ weight(f"{att}.qkv_net").T + e @ state[f"{injection}.weight"].flatten(1).T + state[f"{injection}.bias"]
    if norm == "sub":  # head by head
        Q, K, V = rows.unflatten(2, (H, -1)).chunk(3, dim=3)
    else:
        Q, K, V = (part.unflatten(2, (H, -1)) for part in rows.chunk(3, dim=2))
    omega = state["pos_emb.inv_freq"]
    R = {}
    for distance in range(k):
        pe = torch.cat([(omega * distance).sin(), (omega * distance).cos()])
        R[distance] = (weight(f"{att}.r_net") @ pe).unflatten(0, (H, -1))
    b_w, b_r = state[f"func.{att}.r_w_bias"], state[f"func.{att}.r_r_bias"]
    columns = []
    for t in range(q):
        Q_t = Q[:, m + t]
        scores = [((Q_t + b_w) * K[:, j] + (Q_t + b_r) * R[m + t - j]).sum(dim=2) for j in range(m + t + 1)]
        A = (torch.stack(scores, dim=1) / math.sqrt(Q.shape[3])).softmax(dim=1)
        columns.append((A.unsqueeze(3) * V[:, : m + t + 1]).sum(dim=1).flatten(1))
    a = torch.stack(columns, dim=1)
    if norm == "sub":
        a = norm_of(a, f"{att}.ln2")
    h = a @ weight(f"{att}.o_net").T + state[f"func.{att}.o_net.bias"] + z
    inside = norm_of(h, f"{ff}.ln")  # in post-LN and pre-LN also what is added to
    out = (inside @ weight(f"{ff}.ff1_net").T + state[f"func.{ff}.ff1_net.bias"]).relu()
    out = out @ weight(f"{ff}.ff2_net").T + state[f"func.{ff}.ff2_net.bias"]
    if norm == "sub":
        return h + out
    return inside + out if norm == "pre" else F.layer_norm(inside + out, out.shape[-1:])


@every_norm
def test_the_function_is_the_described_one(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = random_model(**NORMS[norm])
    for value in model.state_dict().values():
        value.normal_(generator=generator)
    state = published(model)
    model = zoo.load_original(state, norm=norm).double()
    state = {key: value.double() for key, value in state.items()}
    z, z0, e = (torch.randn(2, L, 16, generator=generator, dtype=torch.float64) for L in (4, 3, 7))
    u = model.injection(e)
    found = model.cell(z, u[:, 3:], model.cell.past(zoo.Memory(z0, u[:, :3]), 4))
    expected = z
    for i in range(len(model.cell.blocks)):
        expected = described(state, norm, expected, z0, e, 2, f".{i}" if norm == "sub" else "")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@every_norm
def test_weight_norm_is_a_way_to_store_the_same_function(norm: str) -> None:
    normalised = published(random_model(**NORMS[norm]))
    plain = {key: value for key, value in normalised.items() if not re.search(r"weight_[gv]$", key)}
    for key in normalised:
        if key.endswith("weight_v"):
            v, g = normalised[key], normalised[key.replace("_v", "_g")]
            plain[key.removesuffix("_v")] = v * (g / v.flatten(1).norm(dim=1).view_as(g))
    models = [zoo.load_original(state, norm=norm, unrolled=2) for state in (normalised, plain)]
    assert [zoo.spec_of(model).arguments["weight_norm"] for model in models] == [True, False]
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(models[0](tokens)[0], models[1](tokens)[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- refusals


def refusal(source: Any, **overrides: Any) -> str:
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_original(source, **overrides)
    return str(error.value)


def small(norm: str = "post") -> State:
    return published(random_model(**NORMS[norm]))


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("crit.out_layers.1.weight", "word_emb.emb_layers.1.weight"),
        ("crit.out_projs.2.weight", "word_emb.emb_projs.2.weight"),
    ],
)
def test_ties_that_differ(key: str, source: str) -> None:
    state = small()
    assert refusal({**state, key: state[key] + 1}) == (
        f"the given mapping has two different values for one weight: {key} and {source}; nothing was loaded, since it "
        "is not known which was trained"
    )
    del state[key]
    assert refusal(state) == (
        f"the given mapping is no complete checkpoint of a DEQ transformer: in it 1 key is missing: {key!r}"
    )


def test_copies_that_differ() -> None:
    state = before_2021(small())
    key = "deq.func.pos_ff.ff1_net.weight_v"
    assert f"one weight: {key} and func.pos_ff.ff1_net.weight_v" in refusal({**state, key: state[key] + 1})
    key = "deq.func_copy.pos_ff.ff1_net.bias"
    assert f"one weight: {key} and func_copy.pos_ff.ff1_net.bias" in refusal({**state, key: state[key] + 1})
    del state[key]
    assert "has a copy of func_copy.* in deq.func_copy.* that is not complete: 1 names" in refusal(state)


def test_unknown_missing_and_misshapen() -> None:
    state = small()
    renamed = {key.replace("func.pos_ff.ff1_net.bias", "func.pos_ff.ff1_net.bais"): x for key, x in state.items()}
    message = refusal(renamed)
    assert "1 key is unknown: 'func.pos_ff.ff1_net.bais' (near 'func.pos_ff.ff1_net.bias')" in message
    assert "1 key is missing: 'func.pos_ff.ff1_net.bias'" in message
    key = "crit.out_layers.2.bias"
    wrong = f"1 key has another shape or kind: {key!r} is float32 (3,) and should be float32 (14,)"
    assert refusal({**state, key: torch.ones(3)}).endswith(wrong)


@pytest.mark.parametrize(
    "key", ["word_emb.emb_layers.0.weight", "func.dec_attn.r_w_bias", "func.pos_ff.ff1_net.weight_v"]
)
def test_what_sizes_are_read_off(key: str) -> None:
    state = small()
    assert f"has shape (3,) for {key}, which is no weight" in refusal({**state, key: torch.ones(3)})
    del state[key]
    assert f"{key.removesuffix('_v')!r} is missing" in refusal(state)


def test_sizes_that_no_transformer_has() -> None:
    state = small()
    widths = {**state, "word_emb.emb_layers.2.weight": torch.ones(14, 3)}
    assert "has vectors of widths 16, 8, 3 in its clusters, and a DEQ transformer has 16 divided by" in refusal(widths)
    rows = {**small("sub"), "injection.bias": torch.ones(7)}
    assert "has shape (7,) for inject_conv.bias, which has no rows for the queries, keys and values of 2" in refusal(
        rows
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_frequencies(dtype: torch.dtype) -> None:
    state = small()
    state["pos_emb.inv_freq"] = state["pos_emb.inv_freq"].to(dtype)
    zoo.load_original(state)
    message = "has other frequencies in pos_emb.inv_freq than the DEQ transformer, whose are 10000^(-2i/d) for i = 0,"
    for other in (state["pos_emb.inv_freq"] * 1.1, state["pos_emb.inv_freq"][:-1], torch.ones(8, dtype=torch.int64)):
        assert message in refusal({**state, "pos_emb.inv_freq": other})
    del state["pos_emb.inv_freq"]
    zoo.load_original(state)


@pytest.mark.parametrize(
    "override",
    [
        {"vocab_size": 31},
        {"cutoffs": (10, 17)},
        {"d_model": 32},
        {"num_heads": 4},
        {"d_head": 4},
        {"d_inner": 13},
        {"layers": 2},
        {"norm": "sub"},
        {"weight_norm": False},
        {"div_val": 4},
    ],
    ids=str,
)
def test_overrides_that_change_shapes(override: dict[str, Any]) -> None:
    (key, value) = next(iter(override.items()))
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        zoo.load_original(small(), **override)
    assert str(error.value).startswith(f"the given mapping does not fit a model with {key}={value!r}: in it ")
    assert "Read off it are vocab_size=30, cutoffs=(10, 16), d_model=16, num_heads=2, d_inner=12" in str(error.value)


def test_overrides_that_are_wrong() -> None:
    with pytest.raises(ValueError, match=r"unknown norm 'per'\. Did you mean 'pre'"):
        zoo.load_original(small(), norm="per")
    with pytest.raises(ValueError, match=r"model 'deq_transformer' has no argument 'mem_len'"):
        zoo.load_original(small(), mem_len=3)
    solver = Broyden(tol=1e-4)
    loaded = zoo.load_original(small(), solver=solver, memory_length=7, dropout=0.1)
    assert (loaded.deq.solver, loaded.memory_length, loaded.input_dropout.p) == (solver, 7, 0.1)


def test_other_transformers_are_none_of_ours() -> None:
    given = {"word_emb.emb_layers.0.weight": torch.ones(3, 4), "layers.0.dec_attn.qkv_net.weight": torch.ones(12, 4)}
    assert refusal(given).startswith("the given mapping is of no family that load_original knows (MDEQ, DEQ transf")

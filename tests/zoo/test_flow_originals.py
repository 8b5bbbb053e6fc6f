"""Published DEQ-Flow models, and RAFT as a start: every format loads, and every key lands in its place."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models import optical_flow
from torchvision.models.optical_flow import raft_large, raft_small

import zoo
from tests.command_line import same
from tests.zoo.parity import MANIFESTS as MANIFESTS_FOLDER
from tests.zoo.parity import manifest
from zoo.flow import SIZES
from zoo.implicit import Anderson, PhantomGradient
from zoo.originals import UnusedWeightsWarning
from zoo.originals.flow import original_names

State = dict[str, Tensor]

SMALL: dict[str, Any] = {
    "hidden": 6, "feature_width": 4, "encoder_widths": (4, 4, 6, 8), "corr_widths": (6, 5), "flow_widths": (4, 3),
    "motion_width": 7, "head_width": 5, "mask_width": 4, "corr_levels": 2, "corr_radius": 1,
}  # fmt: skip
LEVELS = {"corr_levels": 2}  # 18 values of a look-up are 2 levels of 9, and nothing else


def random_model(**arguments: Any) -> zoo.DEQFlow:
    """A model all of whose tensors are random, the running statistics of BatchNorm too."""
    model = zoo.DEQFlow(**arguments)
    for key, value in model.state_dict().items():
        value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else torch.tensor(len(key)))
    return model


def published(model: zoo.DEQFlow, version: int = 2) -> State:
    """A model's weights as locuslab/deq-flow stores them."""
    return {name: x for key, x in model.state_dict().items() for name in original_names(key, version=version)}


def small(**changes: Any) -> State:
    return published(random_model(**{**SMALL, **changes}))


def multiplied_out(state: State, some: Callable[[str], bool] = lambda _: True) -> State:
    """``state`` without weight normalisation, or without that of ``some`` layers."""
    plain = dict(state)
    for key in state:
        name = key.removesuffix("_v")
        if key.endswith("weight_v") and some(name):
            g, v = plain.pop(f"{name}_g"), plain.pop(key)
            plain[name] = v * (g / v.flatten(1).norm(dim=1).view_as(g))
    return plain


# ------------------------------------------------------------------------------------------------------ what is read


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_sizes_are_read_off_the_shapes(data: st.DataObject) -> None:
    width = st.integers(1, 6)
    arguments: dict[str, Any] = {
        **{key: data.draw(width) for key in ("hidden", "feature_width", "head_width", "mask_width")},
        **{key: (data.draw(width), data.draw(width)) for key in ("corr_widths", "flow_widths")},
        "encoder_widths": tuple([data.draw(width)] * 2 + [data.draw(width) for _ in range(2)]),
        "motion_width": data.draw(st.integers(3, 6)),
        "corr_levels": data.draw(st.integers(1, 4)),
        "corr_radius": data.draw(st.integers(1, 4)),
        "gma": data.draw(st.booleans()),
        "weight_norm": data.draw(st.booleans()),
    }
    model = random_model(**arguments)
    state = published(model, version=data.draw(st.sampled_from([1, 2])))
    wrapped = {f"module.{key}": value for key, value in state.items()} if data.draw(st.booleans()) else state
    loaded = zoo.load_original(wrapped, corr_levels=arguments["corr_levels"])
    assert zoo.spec_of(loaded) == zoo.ModelSpec("deq_flow", arguments)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize(
    ("window", "told", "expected"),
    [
        ((4, 4), {}, (4, 4)),
        ((4, 3), {}, (4, 3)),
        ((2, 1), {}, (2, 1)),
        ((1, 4), {}, (1, 4)),  # 9 levels of 3 x 3 are further from 4
        ((9, 1), {}, (1, 4)),
        ((9, 1), {"corr_radius": 1}, (9, 1)),
        ((9, 1), {"corr_levels": 9}, (9, 1)),
    ],
)
def test_levels_and_radius_of_the_look_up(
    window: tuple[int, int], told: dict[str, int], expected: tuple[int, int]
) -> None:
    state = small(corr_levels=window[0], corr_radius=window[1])
    arguments = zoo.spec_of(zoo.load_original(state, **told)).arguments
    assert (arguments["corr_levels"], arguments["corr_radius"]) == expected


# By reference/architectures.md, section 5.
MANIFESTS = {
    "deqflow_v1_base": ("deq_flow_base", 5_242_816),
    "deqflow_v1_large": ("deq_flow_large", 8_449_920),
    "deqflow_v1_huge": ("deq_flow_huge", 12_799_808),
    "deqflow_v1_gigantic": ("deq_flow_gigantic", 21_914_176),
    "deqflow_v2_tiny": ("deq_flow_tiny", 2_490_976),
    "deqflow_v2_base": ("deq_flow_base", 5_242_816),
    "deqflow_v2_base_gma": ("deq_flow_base", 5_783_617),
    "deqflow_v2_large": ("deq_flow_large", 8_673_664),
    "deqflow_v2_huge": ("deq_flow_huge", 13_394_752),
    "deqflow_v2_gigantic": ("deq_flow_gigantic", 23_248_960),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_manifest(name: str) -> None:
    """A tensor filled with its own number under every key: all numbers but the copies' are found, each once."""
    listed = manifest(name)
    state: State = {}
    for number, (key, entry) in enumerate(listed["state_dict"].items()):
        state[key] = torch.tensor(number, dtype=getattr(torch, entry["dtype"])).expand(entry["shape"])
    for key in state:
        if ".norm3." in key:
            state[key] = state[key.replace(".norm3.", ".downsample.1.")]
    model = zoo.load_original(state)
    registered, count = MANIFESTS[name]
    assert zoo.spec_of(model).model == registered
    assert sum(parameter.numel() for parameter in model.parameters()) == count == listed["n_params"]
    landed = {}
    for value in model.state_dict().values():
        number = value.reshape(-1)[0]
        assert bool((value == number).all())
        landed[int(number)] = value.shape
    assert landed == {int(value.reshape(-1)[0]): value.shape for value in state.values()}
    assert len(model.state_dict()) == len(landed)
    if "v2" in name and "gma" not in name:  # sizes of version 2 are the registered ones
        with torch.device("meta"):
            plain = zoo.create_model(registered)
        assert sum(parameter.numel() for parameter in plain.parameters()) == count


def test_the_manifests_are_all_that_there_are() -> None:
    manifest("deqflow_v1_base")  # or skip
    assert {file.stem for file in MANIFESTS_FOLDER.glob("deqflow*.json")} == set(MANIFESTS)
    assert {name for name, _ in MANIFESTS.values()} == set(SIZES) - {"deq_flow", "deq_flow_nano"}


# ------------------------------------------------------------------------------------------------ weight normalisation


def flow_of(model: Any) -> Tensor:
    images = torch.rand(2, 1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    model.deq.unrolled = 2
    with torch.no_grad():
        flow: Tensor = model(*images)
    return flow


@pytest.mark.parametrize("some", [".*", "encoder", "convz|flow_head"])
def test_weight_norm_is_a_way_to_store_the_same_function(some: str) -> None:
    """Layer by layer, whatever the model has."""
    normalised = small()
    stored = multiplied_out(normalised, lambda name: re.search(some, name) is not None)
    assert len(stored) < len(normalised)
    expected = flow_of(zoo.load_original(normalised))
    found = zoo.load_original(stored)
    assert zoo.spec_of(found).arguments["weight_norm"] == (some != ".*")
    for model in (found, zoo.load_original(stored, weight_norm=True), zoo.load_original(normalised, weight_norm=False)):
        torch.testing.assert_close(flow_of(model), expected, rtol=1e-4, atol=1e-4)


def test_a_mask_that_is_normalised() -> None:
    state = small()
    W = state.pop("mask.0.weight")
    norm = W.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    loaded = zoo.load_original({**state, "mask.0.weight_g": 2 * norm, "mask.0.weight_v": W})
    torch.testing.assert_close(loaded.mask_predictor.convrelu[0].weight.detach(), 2 * W)


def test_channels_of_zeros_have_a_norm_of_zero() -> None:
    state = multiplied_out(small())
    state["update_block.flow_head.conv1.weight"][1] = 0
    loaded = zoo.load_original(state, weight_norm=True)
    assert bool((loaded.deq.cell.update_block.flow_head.conv1.weight[1] == 0).all())
    torch.testing.assert_close(flow_of(loaded), flow_of(zoo.load_original(state)), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- refusals


def refusal(source: Any, **overrides: Any) -> str:
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_original(source, **overrides)
    return str(error.value)


def test_shortcuts_that_differ() -> None:
    state = small()
    twin = {"norm3": "cnet.layer2.0.norm3.running_var", "downsample": "cnet.layer2.0.downsample.1.running_var"}
    assert refusal({**state, twin["norm3"]: state[twin["norm3"]] + 1}) == (
        f"the given mapping has two different values for one weight: {twin['norm3']} and {twin['downsample']}; nothing "
        "was loaded, since it is not known which was trained"
    )
    del state[twin["norm3"]]
    assert refusal(state).endswith(f"in it 1 key is missing: {twin['norm3']!r}")


def test_nothing_is_left_random() -> None:
    """The authors' own loader would ignore version 1's mask in version 2."""
    state = small()
    for key in ("mask.0.weight", "update_block.encoder.conv.weight_v", "cnet.conv2.weight"):
        assert f"{key.removesuffix('_v')!r} is missing" in refusal({k: x for k, x in state.items() if k != key})
    both = {**state, "update_block.mask.0.weight": state["mask.0.weight"]}
    assert "'update_block.mask.2.weight'" in refusal(both)
    renamed = {key.replace("fnet.conv2.bias", "fnet.conv2.bais"): x for key, x in state.items()}
    message = refusal(renamed)
    assert "1 key is unknown: 'fnet.conv2.bais' (near 'fnet.conv2.bias')" in message
    assert "1 key is missing: 'fnet.conv2.bias'" in message
    key = "update_block.gru.convq2.bias"
    wrong = f"1 key has another shape or kind: {key!r} is float32 (3,) and should be float32 (6,)"
    assert refusal({**state, key: torch.ones(3)}).endswith(wrong)
    half = {key: x for key, x in state.items() if key != "update_block.gru.convz1.weight_g"}
    assert "1 key is missing: 'update_block.gru.convz1.weight_g'" in refusal(half)
    assert "'update_block.gru.convz1.weight_v'" in refusal(half, weight_norm=False)


def test_sizes_that_no_flow_has() -> None:
    state = {**small(), "update_block.encoder.convc1.weight_v": torch.ones(6, 7, 1, 1)}
    assert "looks up 7 values of the correlation, which is no number of levels times a window" in refusal(state)


@pytest.mark.parametrize(
    "override",
    [
        {"hidden": 7},
        {"feature_width": 5},
        {"encoder_widths": (4, 4, 6, 9)},
        {"corr_widths": (6, 6)},
        {"flow_widths": (4, 4)},
        {"motion_width": 8},
        {"head_width": 6},
        {"mask_width": 5},
        {"corr_levels": 3},
        {"corr_radius": 2},
        {"gma": True},
    ],
    ids=str,
)
def test_overrides_that_change_shapes(override: dict[str, Any]) -> None:
    ((key, value),) = override.items()
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        zoo.load_original(small(), **override)
    assert str(error.value).startswith(f"the given mapping does not fit a model with {key}={value!r}: in it ")
    assert "Read off it are hidden=6, feature_width=4, encoder_widths=(4, 4, 6, 8)" in str(error.value)


def test_other_overrides() -> None:
    with pytest.raises(ValueError, match=r"model 'deq_flow' has no argument 'hiden'\. Did you mean 'hidden'"):
        zoo.load_original(small(), hiden=3)
    choices: dict[str, Any] = {"solver": Anderson(tol=1e-4), "gradient": PhantomGradient(2), "padding": "bottom"}
    loaded = zoo.load_original(small(), all_grad=False, **choices)
    assert (loaded.deq.solver, loaded.deq.gradient) == (choices["solver"], choices["gradient"])
    assert (loaded.padding, loaded.deq.cell.all_grad) == ("bottom", False)


# -------------------------------------------------------------------------------------------------------------- RAFT


@pytest.fixture(scope="module")
def raft() -> optical_flow.RAFT:
    """torchvision's, with random weights and statistics."""
    generator = torch.Generator().manual_seed(0)
    model = raft_large().eval()
    for key, value in model.state_dict().items():
        if "running" in key:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model


def start_of(model: optical_flow.RAFT) -> zoo.DEQFlow:
    with pytest.warns(UnusedWeightsWarning):
        loaded = zoo.load_original(model.state_dict())
    assert isinstance(loaded, zoo.DEQFlow)
    return loaded


def test_raft_is_a_start(raft: optical_flow.RAFT) -> None:
    state = raft.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    with pytest.warns(UnusedWeightsWarning) as caught:
        model = zoo.load_original(state)
    assert same(dict(state), kept)
    assert len(caught) == 1
    assert Path(caught[0].filename) == Path(__file__)
    told = "the first 128 rows of context_encoder.conv.weight and context_encoder.conv.bias are not used, since"
    assert told in str(caught[0].message)
    spec = zoo.spec_of(model)
    assert spec.model == "deq_flow_base"
    assert all(isinstance(value, bool | int | tuple) for value in spec.arguments.values())
    # All that RAFT has is there, but for half of the last layer of the context encoder.
    ours = {key: value for key, value in model.state_dict().items() if "original0" not in key}
    named = {
        key.removeprefix("deq.cell.").replace("parametrizations.weight.original1", "weight"): value
        for key, value in ours.items()
    }
    expected = {key: value[128:] if "context_encoder.conv." in key else value for key, value in kept.items()}
    assert same(dict(sorted(named.items())), dict(sorted(expected.items())))
    for layer in (module for module in model.modules() if hasattr(module, "parametrizations")):
        V = layer.parametrizations.weight.original1
        torch.testing.assert_close(layer.weight, V)
    with pytest.warns(UnusedWeightsWarning):
        plain = zoo.load_original(state, weight_norm=False)
    assert same(dict(plain.deq.cell.update_block.state_dict()), dict(raft.update_block.state_dict()))


@torch.no_grad()
def test_rafts_updates_are_iterations_of_the_cell(raft: optical_flow.RAFT) -> None:
    """From its own start of the hidden state."""
    K = 3
    model = start_of(raft)
    image1, image2 = torch.rand(2, 1, 3, 128, 136, generator=torch.Generator().manual_seed(1))
    expected = raft(2 * image1 - 1, 2 * image2 - 1, num_flow_updates=K)[-1]
    F1, F2 = model.features(torch.cat([image1, image2])).chunk(2)
    h0 = raft.context_encoder(2 * image1 - 1)[:, :128].tanh()
    model.deq.unrolled = K
    z, _ = model.deq(*model.injection(F1, F2, model.context(image1)), z0=(h0, torch.zeros_like(h0[:, :2])))
    flow = model.upsampled(zoo.flow.FlowState(*z), (128, 136))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(flow, expected, rtol=1e-4, atol=1e-4)


def test_raft_of_princeton(raft: optical_flow.RAFT) -> None:
    """Its keys are those of DEQ-Flow's version 1, and its layers those of torchvision's."""
    state = {}
    for key, value in raft.state_dict().items():
        for name in original_names(key if "update_block" not in key else f"deq.cell.{key}", version=1):
            state[f"module.{name}"] = value
    with pytest.warns(UnusedWeightsWarning, match=r"the first 128 rows of cnet\.conv2\.weight and cnet\.conv2\.bias"):
        loaded = zoo.load_original(state)
    assert same(dict(loaded.state_dict()), dict(start_of(raft).state_dict()))


def test_raft_small_cannot() -> None:
    message = refusal(raft_small().state_dict())
    assert message.startswith("the given mapping is of raft_small: its encoders have bottleneck blocks (layer1.0.conv")
    assert message.endswith("Take raft_large, whose cell is DEQ-Flow's")


def test_a_raft_that_is_not_complete(raft: optical_flow.RAFT) -> None:
    state = dict(raft.state_dict())
    del state["context_encoder.conv.bias"]
    assert refusal(state).endswith("in it 1 key is missing: 'context_encoder.conv.bias'")


# ------------------------------------------------------------------------------------------------- torchvision's files

NAME = "torchvision:Raft_Large_Weights.C_T_V2"
FILE = "raft_large_C_T_V2-1bb1363a.pth"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def test_weights_are_fetched_once(
    raft: optical_flow.RAFT, hub: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    asked = []

    def download(url: str, path: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        asked.append((url, Path(path), hash_prefix))
        torch.save(raft.state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr("zoo.originals.raft.sha256_of", lambda data: "1bb1363a" + hashlib.sha256(data).hexdigest()[8:])
    warnings.simplefilter("always")
    solver = Anderson(tol=1e-4)
    models = [zoo.load_pretrained(NAME), zoo.load_pretrained(NAME, solver=solver)]
    assert asked == [(f"https://download.pytorch.org/models/{FILE}", hub / FILE, "1bb1363a")]
    expected = dict(start_of(raft).state_dict())
    for model in models:
        assert same(dict(model.state_dict()), expected)
        assert zoo.spec_of(model).model == "deq_flow_base"
    assert models[1].deq.solver == solver
    told = [warning for warning in recwarn if warning.category is UnusedWeightsWarning]
    assert len(told) == len(models)
    assert str(told[0].message).startswith(f"{NAME} is of RAFT, which starts its hidden state at")


def test_without_a_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_pretrained(NAME)
    assert str(error.value) == (
        f"https://download.pytorch.org/models/{FILE} cannot be fetched (<urlopen error no route to host>). Fetch it "
        f"where there is a network, and put it at {hub / FILE}"
    )


def test_damaged_files(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are fetched, and those that lie there."""

    def download(url: str, path: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        raise RuntimeError(f'invalid hash value (expected "{hash_prefix}", got "0")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(zoo.WeightsError, match=rf"{FILE} was damaged on its way, .*: invalid hash value"):
        zoo.load_pretrained(NAME)
    (hub / FILE).write_bytes(b"something else")
    with pytest.raises(zoo.WeightsError, match=r"its sha256 does not begin with 1bb1363a; nothing was loaded"):
        zoo.load_pretrained(NAME)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:Raft_Large_Weights.C_T_V3", r"Did you mean 'torchvision:Raft_Large_Weights\.C_T_V\d'"),
        ("torchvision:raft_large", r"unknown weights 'torchvision:raft_large'\..* Known: torchvision:Raft_Large_Wei"),
        ("torchvision:Raft_Small_Weights.C_T_V2", r"are of raft_small, whose layers are others than DEQ-Flow's\. Know"),
    ],
)
def test_names_that_are_not_known(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.load_pretrained(name)

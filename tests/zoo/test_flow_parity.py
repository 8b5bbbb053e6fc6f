"""DEQ-Flow is the same function as the original: features, look-up, update, flows, losses, gradients, as recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from tests.zoo.parity import meta, parity
from zoo.correlation import look_up
from zoo.flow import FlowState, pixel_grid
from zoo.implicit import (
    GMRES,
    FixedPointIteration,
    Gradient,
    ImplicitGradient,
    PhantomGradient,
    Trajectory,
    fixed_point_correction,
)
from zoo.originals.flow import original_names

NAME = "deqflow_v2_mini"
EXACT, STORED_IN_FLOAT32 = 1e-9, 1e-5


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return parity(NAME)


def load(**choices: Any) -> zoo.DEQFlow:
    """The original's weights, in float64."""
    state = parity(NAME, "state_dict")
    for key in state:
        # The original has one BatchNorm under two names. Here they were given two values, the second of which it used.
        if ".norm3." in key:
            state[key] = state[key.replace(".norm3.", ".downsample.1.")]
    model = zoo.load_original(state, **choices)
    assert isinstance(model, zoo.DEQFlow)
    return model.double()


def solver(tol: float, max_steps: int) -> FixedPointIteration:
    """The original's, which looks at the residual at each step."""
    return FixedPointIteration(tol=tol, norm="absolute", max_steps=max_steps, check_every=1)


def inputs_of(model: zoo.DEQFlow, data: dict[str, Tensor]) -> tuple[Any, ...]:
    """What the cell is given."""
    F1, F2 = model.features(torch.cat([data["image1"], data["image2"]])).chunk(2)
    return model.injection(F1, F2, model.context(data["image1"]))


def state_in(data: dict[str, Tensor]) -> FlowState:
    c = data["coords_in"].double()
    return FlowState(data["h_in"].double(), c - pixel_grid(c))


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def test_sizes_are_read_off_the_shapes() -> None:
    hyper = meta(NAME)["model"]
    spec = zoo.spec_of(load())
    motion = hyper["motion"]
    assert spec == zoo.ModelSpec(
        "deq_flow",
        {
            "hidden": hyper["hidden"],
            "feature_width": hyper["fnet_out"],
            "encoder_widths": (hyper["encoder_widths"][0], *hyper["encoder_widths"]),
            "corr_widths": (motion["c1"], motion["c2"]),
            "flow_widths": (motion["f1"], motion["f2"]),
            "motion_width": motion["out"],
            "head_width": hyper["flow_head_hidden"],
            "mask_width": hyper["mask_hidden"],
            "corr_levels": hyper["corr_levels"],
            "corr_radius": hyper["corr_radius"],
            "gma": False,
            "weight_norm": True,
        },
    )


@torch.no_grad()
def test_the_parts(data: dict[str, Tensor]) -> None:
    model, (h, v) = load(), state_in(data)
    assert apart(model.features(data["image1"]), data["fmap1"]) <= STORED_IN_FLOAT32
    assert apart(model.context(data["image1"]), data["context"]) <= STORED_IN_FLOAT32
    inputs = inputs_of(model, data)
    found = look_up(inputs[1], pixel_grid(v) + v, 4)
    assert apart(found[:, ::4], data["corr_lookup_every4"]) <= STORED_IN_FLOAT32
    motion = model.deq.cell.update_block.motion_encoder(v, found)  # type: ignore[union-attr,operator]
    assert apart(motion, data["motion_features"]) <= STORED_IN_FLOAT32
    h_out, v_out = model.deq.cell((h, v), *inputs)
    assert apart(h_out, data["h_out"]) <= EXACT
    assert apart(v_out - v, data["delta_flow"]) <= EXACT
    assert apart(model.upsampled(FlowState(h, v), (128, 144)), data["flow_up_of_in"]) <= STORED_IN_FLOAT32


@torch.no_grad()
def test_a_number_of_updates_and_warm_starts(data: dict[str, Tensor]) -> None:
    model, images = load(unrolled=1), (data["image1"], data["image2"])
    _, first = model.estimate(*images)
    assert apart(first.h, data["h_K1"]) <= EXACT
    assert apart(first.flow, data["flow_low_K1"]) <= EXACT
    model.deq.unrolled = 7
    _, state = model.estimate(*images)
    assert apart(state.h, data["h_K7"]) <= EXACT
    assert apart(state.flow, data["flow_low_K7"]) <= EXACT
    _, state = model.estimate(*images, FlowState(torch.zeros_like(first.h), data["flow_init"].double()))
    assert apart(state.flow, data["flow_low_K7_flow_init"]) <= EXACT
    _, state = model.estimate(*images, first)
    assert apart(state.flow, data["flow_low_K7_from_cached_K1"]) <= EXACT


@torch.no_grad()
def test_the_equilibrium(data: dict[str, Tensor]) -> None:
    model = load(solver=solver(1e-12, 400))
    flow, state = model.estimate(data["image1"], data["image2"])
    assert apart(state.h, data["h_eq"]) <= EXACT
    assert apart(state.flow, data["flow_low_eq"]) <= EXACT
    assert apart(flow, data["flow_up_eq"]) <= STORED_IN_FLOAT32


def test_the_published_evaluation(data: dict[str, Tensor]) -> None:
    """It stops where ours does, and returns f(z) where we return z: one update more, which the gradient also makes."""
    published = meta(NAME)["results"]["default_eval"]
    model = load(solver=solver(published["f_eps"], published["eval_f_thres"]))
    images = (data["image1"], data["image2"])
    with torch.no_grad():
        _, z = model.estimate(*images)
        assert model.deq.report is not None
        assert [model.deq.report.evaluations] == published["nstep"]
        assert model.deq.report.residual.item() == pytest.approx(published["last_abs"], abs=1e-12)
        _, flow = model.deq.cell(z, *inputs_of(model, data))
        assert apart(flow, data["flow_low_default"]) <= EXACT
        assert apart(z.flow, data["flow_low_default"]) <= 1e-4
    assert apart(model.estimate(*images)[1].flow, data["flow_low_default"]) <= EXACT


def phantom(steps: int) -> PhantomGradient:
    return PhantomGradient(steps, advance=True)


@pytest.mark.parametrize(
    ("name", "steps", "cuts", "gradient", "all_grad"),
    [
        ("pg3_allgrad", 8, [4], phantom(3), True),
        ("pg1_detached", 6, [1, 2, 3, 4, 5], phantom(1), False),
        ("ift_allgrad", 300, None, ImplicitGradient(GMRES(tol=1e-9, max_steps=100)), True),
    ],
)
def test_losses_and_gradients(
    data: dict[str, Tensor], name: str, steps: int, cuts: list[int] | None, gradient: Gradient, all_grad: bool
) -> None:
    """The published losses: at the end of each slice of a solve, and at the equilibrium."""
    model = load(solver=solver(1e-11 if cuts is None else 1e-3, steps), gradient=gradient, all_grad=all_grad)
    model.deq.on_failure = "ignore"  # few steps, as published
    images = (data["image1"], data["image2"])
    flows = [model(*images)] if cuts is None else model(*images, trajectory=Trajectory(cuts, gradient, sliced=True))
    truth = data["flow_gt"].double()
    known = (data["valid"].bool() & (truth.norm(dim=1) < 400)).unsqueeze(1)
    loss = fixed_point_correction(lambda flow: (known * (flow - truth).abs()).mean(), flows)
    kind = "train_" + name.replace("pg", "phantom")
    assert loss.item() == pytest.approx(meta(NAME)["results"][kind]["loss"], abs=1e-9)
    loss.backward()
    compared = set()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        for stored in {f"grad_{name}.{original}" for original in original_names(key)} & data.keys():
            expected = data[stored]
            # Normalisation takes the bias before it away: its gradient is 0, but for rounding.
            assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm() + 1e-15, key
            compared.add(stored)
    assert compared == {key for key in data if key.startswith(f"grad_{name}.")}

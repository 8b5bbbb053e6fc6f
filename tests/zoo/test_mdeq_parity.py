"""MDEQ is the same function as the originals: f, equilibrium, gradients, penalties, as they recorded them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from tests.problems import flat, unflat
from tests.zoo.parity import meta, parity
from zoo.implicit import Anderson, Broyden, FixedPointIteration, ImplicitGradient, Solver, jacobian_penalty
from zoo.originals.mdeq import original_name

# What no shape tells. The recorded images are what the network sees, so that mean and std do nothing.
ORIGINALS: dict[str, dict[str, Any]] = {
    "mdeq_cifar_tiny": {"mean": 0.0, "std": 1.0, "dropout": 0.0},
    "mdeq_imagenet_mini": {"stem_stride": 4},
    "mdeq_seg_mini": {"stem_stride": 4},
}
TIGHT = {"tol": 1e-13, "max_steps": 200}
every_original = pytest.mark.parametrize("name", ORIGINALS)


def load(name: str, solver: Solver | None = None) -> nn.Module:
    """The original's weights, in float64."""
    solver = FixedPointIteration(**TIGHT) if solver is None else solver
    arguments = {**ORIGINALS[name], "solver": solver, "gradient": ImplicitGradient(solver)}
    return zoo.load_original(parity(name, "state_dict"), **arguments).double()


def state(data: dict[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """``name``.0, ``name``.1, ... in float64."""
    return tuple(data[key].double() for key in sorted(data) if key.startswith(f"{name}."))


def apart(a: Any, b: Any) -> float:
    """The largest difference of two tensors or states."""
    return (flat(a) - flat(b)).abs().max().item()


@every_original
def test_the_cell_once(name: str) -> None:
    model, data = load(name), parity(name)
    with torch.no_grad():
        x = model.stem(data["x"].double())
        assert apart(x, data["inj0"]) <= 1e-10
        assert apart(model.deq.cell(state(data, "z_in"), x), state(data, "f_out")) <= 1e-10


# Plain iteration solves in the test of the gradients.
SOLVERS = {
    "mdeq_cifar_tiny": Broyden(**TIGHT),
    "mdeq_imagenet_mini": Anderson(**TIGHT),
    "mdeq_seg_mini": Broyden(**TIGHT),
}


@pytest.mark.parametrize(("name", "solver"), SOLVERS.items(), ids=SOLVERS)
def test_the_equilibrium(name: str, solver: Solver) -> None:
    model, data = load(name, solver), parity(name)
    with torch.no_grad():
        x = data["x"].double()
        assert apart(model.equilibrium(x), state(data, "z_star")) <= 1e-9
        assert apart(model.coarse_logits(x), data["out_eq"]) <= 1e-9
    assert bool(model.deq.report.converged.all())


@every_original
def test_all_gradients(name: str) -> None:
    model, data = load(name), parity(name)
    loss = (model.coarse_logits(data["x"].double()) * data["R"].double()).sum()
    assert loss.item() == pytest.approx(meta(name)["results"]["loss_R"], abs=1e-9)
    loss.backward()
    segmenter = isinstance(model, zoo.MDEQSegmenter)
    ours = {f"grad.{original_name(key, segmenter=segmenter)}": value.grad for key, value in model.named_parameters()}
    assert set(ours) == {key for key in data if key.startswith("grad.")}
    for key, gradient in ours.items():
        assert gradient is not None
        assert gradient.shape == data[key].shape
        assert (gradient - data[key]).norm() <= 1e-5 * data[key].norm(), key


@every_original
def test_unrolled(name: str) -> None:
    model, data = load(name), parity(name)
    model.deq.unrolled = meta(name)["model"]["NUM_LAYERS"]
    with torch.no_grad():
        assert apart(model.coarse_logits(data["x"].double()), data["out_unrolled"]) <= 1e-9


@every_original
def test_as_published(name: str) -> None:
    """The published solver, tolerance and number of steps, in float32. Where it stops differs in detail."""
    settings = meta(name)["results"]["default_eval"]
    norm = {"abs": "absolute", "rel": "relative"}[settings["stop_mode"]]
    solver = Broyden(tol=settings["eps"], norm=norm, max_steps=settings["F_THRES"])
    model, data = load(name, solver).float(), parity(name)
    with torch.no_grad():
        out = model.coarse_logits(data["x"])
    assert out.dtype == torch.float32
    assert apart(out, data["out_default_f32"]) <= 1e-3 * settings["out_absmax"]


@every_original
def test_the_jacobian_penalty_with_their_probes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = load(name), parity(name)
    probes = [data[f"jac.v{k}"].double().squeeze(2) for k in range(2)]
    left = list(probes)
    monkeypatch.setattr(torch, "randn_like", lambda like: left.pop(0).reshape(like.shape))
    with torch.no_grad():
        x = model.stem(data["x"].double())
    penalty = jacobian_penalty(model.deq.cell, state(data, "z_star"), x, probes=2)
    assert left == []
    assert penalty.mean().item() == pytest.approx(meta(name)["results"]["jac_loss"], rel=1e-9)


# Where the largest eigenvalues are complex pairs, power iteration converges to nothing. These are of a dense Jacobian.
COMPLEX_PAIRS = {"mdeq_imagenet_mini": (0.5875, 0.6869)}


@every_original
def test_the_spectral_radius(name: str) -> None:
    """Theirs is |v^T J v| after 150 power iterations from their start."""
    model, data = load(name), parity(name)
    theirs = torch.tensor(meta(name)["results"]["sradius_150"], dtype=torch.float64)
    with torch.no_grad():
        x = model.stem(data["x"].double())
    z = tuple(part.requires_grad_() for part in state(data, "z_star"))
    fz = flat(model.deq.cell(z, x))
    v = data["jac.power_start"].double().squeeze(2)
    for _ in range(150):
        before = v / v.norm(dim=1, keepdim=True)
        v = flat(torch.autograd.grad(fz, z, before, retain_graph=True))
    torch.testing.assert_close((before * v).sum(dim=1).abs(), theirs, rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(0)
    ours = zoo.implicit.spectral_radius(model.deq.cell, state(data, "z_star"), x, products=60, generator=generator)
    expected = torch.tensor(COMPLEX_PAIRS[name], dtype=torch.float64) if name in COMPLEX_PAIRS else theirs
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=0)


@every_original
def test_their_dropout_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = load(name), parity(name)
    for branch, mask in zip(model.deq.cell.branches, state(data, "drop.mask"), strict=True):
        assert (mask == 0).any()
        monkeypatch.setattr(branch.dropout, "forward", lambda t, mask=mask: t * mask)
    with torch.no_grad():
        found = model.deq.cell(state(data, "z_in"), model.stem(data["x"].double()))
    assert apart(found, state(data, "drop.f_out")) <= 1e-6
    assert apart(found, state(data, "f_out")) > 1e-3


def test_the_older_format_is_the_same_function() -> None:
    newer, older = (
        zoo.load_original(parity(name, "state_dict"), stem_stride=4, solver=Broyden(**TIGHT)).double()
        for name in ("mdeq_imagenet_mini", "mdeq_v1_imagenet_mini")
    )
    data = parity("mdeq_imagenet_mini")
    assert zoo.spec_of(older) == zoo.spec_of(newer)
    with torch.no_grad():
        x, z = newer.stem(data["x"].double()), state(data, "z_in")
        assert all(map(torch.equal, older.deq.cell(z, x), newer.deq.cell(z, x)))
        assert apart(older(data["x"].double()), parity("mdeq_v1_imagenet_mini")["out_eq"]) <= 1e-9


def test_the_states_are_read_in_order() -> None:
    """``flat`` puts the branches in the order in which the originals' probes have them."""
    data = parity("mdeq_seg_mini")
    z = state(data, "z_star")
    assert [part.shape[1] for part in z] == meta("mdeq_seg_mini")["model"]["NUM_CHANNELS"]
    assert math.prod(flat(z).shape) == data["jac.v0"].numel()
    assert apart(unflat(flat(z), z), z) == 0

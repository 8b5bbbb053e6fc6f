"""The tanh family: its cell, the tutorial's three layers, and what the model says about wrong input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import generator
from zoo import InputError
from zoo.implicit import (
    Anderson,
    FixedPointIteration,
    Gradient,
    ImplicitGradient,
    Newton,
    PhantomGradient,
    Solver,
    UnrolledGradient,
)
from zoo.tanh import TanhCell, TanhDEQ

TUTORIAL: dict[str, tuple[Solver, Gradient]] = {
    "iteration, unrolled": (FixedPointIteration(tol=1e-6, max_steps=200), UnrolledGradient()),
    "newton, unrolled": (Newton(tol=1e-6), UnrolledGradient()),
    "newton, implicit": (Newton(tol=1e-6), ImplicitGradient(Newton(tol=1e-6))),
    "anderson, implicit": (Anderson(tol=1e-6), ImplicitGradient(Anderson(tol=1e-6))),
}


def digits(batch: int = 5) -> Tensor:
    return torch.rand(batch, 1, 8, 8, generator=generator(1))


def model(**arguments: Any) -> TanhDEQ:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TanhDEQ(width=24, **arguments)


# ------------------------------------------------------------------------------------------------------------- the cell


@pytest.mark.parametrize("contraction", [None, 0.5])
def test_the_jacobian_is_that_of_torch_func(contraction: float | None) -> None:
    cell = TanhCell(6, contraction).double()
    z, x = (torch.randn(4, 6, dtype=torch.float64, generator=generator(n)) for n in (2, 3))
    automatic = torch.vmap(torch.func.jacrev(lambda z, x: cell(z[None], x[None])[0]))(z, x)
    torch.testing.assert_close(cell.jacobian(z, x), automatic, rtol=0, atol=1e-14)
    assert cell.jacobian(z, x).shape == (4, 6, 6)


def test_the_cell_is_its_equation() -> None:
    cell = TanhCell(3)
    z, x = torch.randn(2, 3, generator=generator(0)), torch.randn(2, 3, generator=generator(1))
    torch.testing.assert_close(cell(z, x), torch.tanh(z @ cell.linear.weight.mT + x))
    assert cell.linear.bias is None
    assert not cell.initial_state(x).any()
    assert cell.initial_state(x).shape == x.shape


def test_the_state_has_the_dtype_of_the_weights() -> None:
    assert TanhCell(3).initial_state(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert TanhCell(3).bfloat16().initial_state(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert TanhCell(3, 0.5).double().initial_state(torch.zeros(2, 3)).dtype == torch.float64


@pytest.mark.parametrize("bound", [0.3, 0.95])
def test_a_contraction_contracts(bound: float) -> None:
    cell = TanhCell(6, bound).double()
    with torch.no_grad():
        cell.linear.weight = 10 * torch.randn(6, 6, dtype=torch.float64, generator=generator(0))
    assert torch.linalg.matrix_norm(cell.linear.weight, ord=2) <= bound * (1 + 1e-12)
    z, w, x = (torch.randn(50, 6, dtype=torch.float64, generator=generator(n)) for n in range(3))
    ratio = (cell(z, x) - cell(w, x)).norm(dim=1) / (z - w).norm(dim=1)
    assert ratio.max() <= bound
    assert [name for name, _ in cell.named_parameters()] == ["linear.parametrizations.weight.original"]


def test_a_contraction_is_solved_from_anywhere() -> None:
    deq = model(contraction=0.9, solver=FixedPointIteration(tol=1e-5, max_steps=200)).deq
    with torch.no_grad():
        deq.cell.linear.weight = 10 * torch.randn(24, 24, generator=generator(0))
        x = torch.randn(3, 24, generator=generator(1))
        a, _ = deq(x)
        b, _ = deq(x, z0=torch.ones(3, 24))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("contraction", [0.0, -0.5])
def test_a_contraction_is_positive(contraction: float) -> None:
    with pytest.raises(ValueError, match=r"SpectralBound\(bound=...\) takes a positive number"):
        TanhDEQ(contraction=contraction)


# ------------------------------------------------------------------------------------------------------------ the model


def test_the_tutorials_layers_are_configurations_of_one_model() -> None:
    """Same logits, and the same gradients up to the tolerance of the solves."""
    logits, gradients = [], []
    for solver, gradient in TUTORIAL.values():
        m = model(solver=solver, gradient=gradient)
        out = m(digits())
        torch.nn.functional.cross_entropy(out, torch.arange(5)).backward()
        logits.append(out.detach())
        gradients.append([p.grad for p in m.parameters()])
        assert m.deq.report is not None
        assert m.deq.report.converged.all()
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-4)
    for other_gradients in gradients[1:]:
        for ours, reference in zip(other_gradients, gradients[0], strict=True):
            assert (ours - reference).norm() < 1e-3 * reference.norm()


def test_the_model_is_its_equations() -> None:
    m = model(mean=0.3, std=0.5, solver=Newton(tol=1e-6))
    image = digits()
    with torch.no_grad():
        x = m.injection((image.reshape(5, 64) - 0.3) / 0.5)
        z = torch.zeros_like(x)
        for _ in range(200):
            z = torch.tanh(z @ m.deq.cell.linear.weight.mT + x)
        torch.testing.assert_close(m(image), m.classifier(z), rtol=0, atol=1e-4)


def test_defaults_are_those_of_the_digits() -> None:
    m = TanhDEQ()
    assert m(digits()).shape == (5, 10)
    assert (m.injection.in_features, m.deq.cell.linear.in_features) == (64, 128)
    assert (m.deq.solver, m.deq.gradient) == (Anderson(), ImplicitGradient())
    assert m.classifier is getattr(m, m.classifier_name)


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8), (2, 4, 8)])
def test_any_shape_of_the_right_size(shape: tuple[int, ...]) -> None:
    m = model()
    flat = torch.rand(3, 64, generator=generator(0))
    torch.testing.assert_close(m(flat.reshape(3, *shape)), m(flat), rtol=0, atol=0)


def test_one_feature_needs_no_feature_dimension() -> None:
    m = TanhDEQ(in_features=1, width=4)
    torch.testing.assert_close(m(torch.ones(3)), m(torch.ones(3, 1)))


@pytest.mark.parametrize("gradient", [ImplicitGradient(), PhantomGradient(), UnrolledGradient()], ids=str)
def test_an_empty_batch(gradient: Gradient) -> None:
    m = model(gradient=gradient)
    logits = m(digits(0))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_images_that_are_not_floating_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(
        InputError, match=rf"takes floating images in \[0, 1\]; given: {dtype}. Use image.float\(\) / 255"
    ):
        model()(torch.zeros(2, 1, 8, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "entries"), [((2, 1, 28, 28), 784), ((2, 63), 63), ((64,), 1), ((8, 8), 8), ((), 1), ((2, 0), 0)]
)
def test_images_of_another_size_are_refused(shape: tuple[int, ...], entries: int) -> None:
    with pytest.raises(ValueError, match="batch of inputs of 64 entries") as caught:
        model()(torch.zeros(shape))
    assert f"given: shape {shape}, that is {entries} entries a sample" in str(caught.value)


def test_a_solver_by_name_is_refused_with_advice() -> None:
    with pytest.raises(TypeError, match=r"solver= takes a solver object, like Anderson\(tol=1e-4\); given: 'newton'"):
        TanhDEQ(solver="newton")  # type: ignore[arg-type]

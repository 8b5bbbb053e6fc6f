"""Weights that are computed: the bound holds, they are computed once a solve, and what is behind them learns."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.problems import METHODS, SOLVERS, Method, generator, tight
from zoo.implicit import DEQ, Anderson, ImplicitGradient, Newton, SolverReport, SpectralBound
from zoo.tanh import TanhCell

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def bounded_deq(method: Method | None = None, steep: float = 3.0) -> tuple[DEQ, Tensor]:
    """A cell whose free weight is far above its bound, in float64."""
    cell = TanhCell(4, contraction=0.8).double()
    with torch.no_grad():
        cell.linear.parametrizations.weight.original.mul_(steep)
    method = method or Method(tight(Anderson()), ImplicitGradient(tight(Anderson())))
    return DEQ(cell, method.solver, method.gradient), torch.randn(3, 4, dtype=torch.float64, generator=generator(1))


# ----------------------------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize("bound", [0.1, 0.9, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 1)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_norm_is_bounded(bound: float, shape: tuple[int, int], scale: float) -> None:
    V = scale * torch.randn(*shape, dtype=torch.float64, generator=generator(0))
    W = SpectralBound(bound)(V)
    norm = torch.linalg.matrix_norm(V, ord=2)
    assert torch.linalg.matrix_norm(W, ord=2) <= bound * (1 + 1e-12)
    if norm <= bound:
        assert torch.equal(W, V)
    else:
        torch.testing.assert_close(W, V * (bound / norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_norm_is_bounded_up_to_the_rounding_of_a_narrow_weight(dtype: torch.dtype, scale: float) -> None:
    V = (scale * torch.randn(6, 4, generator=generator(0))).to(dtype).requires_grad_()
    W = SpectralBound(0.9)(V)
    assert W.dtype == dtype
    assert torch.linalg.matrix_norm(W.double(), ord=2) <= 0.9 * (1 + 2 * torch.finfo(dtype).eps)
    W.sum().backward()
    assert V.grad is not None
    assert V.grad.isfinite().all()


def test_the_bound_is_computed_in_full_precision_in_autocast() -> None:
    V = 3 * torch.randn(6, 4, generator=generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        W = SpectralBound(0.9)(V)
    torch.testing.assert_close(W, SpectralBound(0.9)(V), rtol=0, atol=0)


def test_the_bound_holds_after_training_steps() -> None:
    deq, x = bounded_deq()
    optimizer = torch.optim.SGD(deq.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        (-deq(x)[0].square().sum()).backward()
        optimizer.step()
        assert torch.linalg.matrix_norm(deq.cell.linear.weight, ord=2) <= 0.8 * (1 + 1e-12)


@pytest.mark.parametrize("scale", [0.05, 2.0], ids=["inside", "outside"])
def test_gradcheck_of_the_bound(scale: float) -> None:
    V = (scale * torch.randn(3, 4, dtype=torch.float64, generator=generator(2))).requires_grad_()
    assert torch.autograd.gradcheck(SpectralBound(0.7), V)


def test_a_weight_of_zeros_has_a_gradient() -> None:
    """Zero is a common initialisation; a bound over a norm of 0 would be NaN times 0."""
    V = torch.zeros(3, 3, requires_grad=True)
    SpectralBound(0.9)(V).sum().backward()
    assert torch.equal(V.grad, torch.ones(3, 3))


@pytest.mark.parametrize("bound", [0, -1.0, float("nan")])
def test_a_bound_is_positive(bound: float) -> None:
    with pytest.raises(ValueError, match=r"SpectralBound\(bound=...\) takes a positive number; given: "):
        SpectralBound(bound)


@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (2, 3, 3), (3,)])
def test_only_a_matrix_has_this_norm(shape: tuple[int, ...]) -> None:
    """A convolution's kernel broadcasts against its norms over the last two dimensions: without an error, wrongly."""
    with pytest.raises(
        ValueError, match=r"matrix of shape \(m, n\); given: shape \(3|matrix of shape.*given: shape \(2"
    ):
        SpectralBound(0.9)(torch.ones(shape))


# ----------------------------------------------------------------------------------------------------------- in a DEQ


@every_method
def test_gradcheck_through_the_bound_and_the_solve(method: Method) -> None:
    deq, x = bounded_deq(method)

    def solve(original: Tensor, x: Tensor) -> Tensor:
        z, _ = torch.func.functional_call(deq, {"cell.linear.parametrizations.weight.original": original}, (x,))
        return z

    original = deq.cell.linear.parametrizations.weight.original.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        solve, (original, x.requires_grad_()), eps=1e-5, atol=1e-7, rtol=1e-6, fast_mode=True
    )


@every_method
@pytest.mark.parametrize("enabled", [True, False])
def test_computed_once_a_call(method: Method, enabled: bool) -> None:
    deq, x = bounded_deq(method)
    calls = []
    deq.cell.linear.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(enabled):
        _, report = deq(x)
        assert len(calls) == 1
        assert report.evaluations > 3
        deq(x)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
@every_method
def test_torchs_own_parametrizations_learn(method: Method, name: str) -> None:
    """Though the solve runs under no_grad; the reference recomputes the weight at each of many plain iterations."""
    cell = TanhCell(4).double()
    with torch.no_grad():
        cell.linear.weight.mul_(0.5)
    getattr(parametrizations, name)(cell.linear)
    scale = 0.6 if name == "orthogonal" else 1.0
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator(1))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cell

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.inner(scale * z, x)

        def initial_state(self, x: Tensor) -> Tensor:
            return self.inner.initial_state(x)

    deq = DEQ(Scaled(), method.solver, method.gradient).eval()
    parameters = list(deq.parameters())
    z, _ = deq(x)
    found = torch.autograd.grad(z.square().sum(), parameters, retain_graph=True)
    state = torch.zeros_like(x)
    for _ in range(100):
        state = deq.cell(state, x)
    for ours, reference in zip(found, torch.autograd.grad(state.square().sum(), parameters), strict=True):
        assert reference.abs().max() > 0
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-8)


def test_nothing_stays_cached_after_a_call() -> None:
    deq, x = bounded_deq()
    first, _ = deq(x)
    with torch.no_grad():
        deq.cell.linear.parametrizations.weight.original.copy_(0.1 * torch.eye(4, dtype=torch.float64))
    second, _ = deq(x)
    expected, _ = DEQ(TanhCellOf(0.1 * torch.eye(4, dtype=torch.float64)), tight(Anderson()))(x)
    torch.testing.assert_close(second.detach(), expected.detach(), rtol=0, atol=1e-11)
    assert (first - second).abs().max() > 0.1


def TanhCellOf(weight: Tensor) -> TanhCell:  # noqa: N802
    cell = TanhCell(weight.shape[0]).to(weight.dtype)
    with torch.no_grad():
        cell.linear.weight.copy_(weight)
    return cell


# ------------------------------------------------------------------------------------------------------- round trips


def used(contraction: float | None) -> tuple[DEQ, Tensor]:
    """A DEQ that has solved and differentiated, and so holds two reports."""
    deq = DEQ(TanhCell(4, contraction).double(), Newton(), ImplicitGradient(Anderson(tol=1e-3)), on_failure="ignore")
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator(1))
    deq(x, trace=True)[0].sum().backward()
    assert deq.adjoint_report is not None
    return deq, x


def assert_same(copied: DEQ, deq: DEQ, x: Tensor) -> None:
    assert (copied.solver, copied.gradient, copied.on_failure) == (deq.solver, deq.gradient, deq.on_failure)
    assert isinstance(copied.report, SolverReport)
    assert {id(p) for p in copied.parameters()}.isdisjoint({id(p) for p in deq.parameters()})
    results = []
    for module in (copied, deq):
        module.zero_grad()
        z, _ = module(x)
        z.sum().backward()
        results.append([z.detach(), *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("contraction", [None, 0.9])
def test_deepcopy(contraction: float | None) -> None:
    deq, x = used(contraction)
    assert_same(copy.deepcopy(deq), deq, x)


def saved_and_loaded(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copying", [lambda deq: pickle.loads(pickle.dumps(deq)), saved_and_loaded])  # noqa: S301
def test_pickle_and_torch_save(copying: Any) -> None:
    deq, x = used(None)
    assert_same(copying(deq), deq, x)


def test_torch_does_not_pickle_parametrized_modules_and_says_what_to_do() -> None:
    deq, _ = used(0.9)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(deq)


@pytest.mark.parametrize("contraction", [None, 0.9])
def test_state_dict(contraction: float | None) -> None:
    deq, x = used(contraction)
    buffer = io.BytesIO()
    torch.save(deq.state_dict(), buffer)
    buffer.seek(0)
    other, _ = used(contraction)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(other, deq, x)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_choices_are_values(solver: Any) -> None:
    """Equal, hashable, frozen, picklable."""
    twin = pickle.loads(pickle.dumps(solver))  # noqa: S301
    assert twin == solver
    assert hash(twin) == hash(solver)
    assert {twin: 1}[solver] == 1
    with pytest.raises(AttributeError):
        solver.tol = 1.0


def test_the_choices_of_a_deq_are_shown() -> None:
    text = repr(DEQ(TanhCell(2, 0.5), Newton(tol=1e-3)))
    assert "solver=Newton(tol=0.001" in text
    assert "gradient=ImplicitGradient(solver=Anderson(" in text
    assert "bound=0.5" in text
    assert parametrize.is_parametrized(TanhCell(2, 0.5).linear)

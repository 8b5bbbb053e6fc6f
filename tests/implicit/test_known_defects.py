"""Defects that were measured in TorchDEQ 0.1.0, one by one: the same situation here, and the right result.

W1 to W14 gave silent wrong results, S1 to S3 came from samples that share a batch, and M01 to M16 are what was missing
or failed. The numbers in the tests are those of the situations in which each was found.
"""

# ruff: noqa: N802 - the tests are named after the rows of the list of defects

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from tests.implicit import known_defects_ddp
from tests.problems import (
    SOLVERS,
    Counting,
    InjectedTanhCell,
    LinearCell,
    Problem,
    contraction,
    flat,
    generator,
    nested_problem,
    pair_problem,
    residual,
    tanh_problem,
    tight,
)
from zoo.implicit import (
    DEQ,
    GMRES,
    Anderson,
    Broyden,
    ConvergenceWarning,
    ConvolutionBound,
    FixedPointIteration,
    Gradient,
    ImplicitGradient,
    NeumannGradient,
    Newton,
    PhantomGradient,
    Solver,
    SolverReport,
    SolverStatus,
    Trajectory,
    UnrolledGradient,
    VariationalDropout,
    describe,
    fixed_point,
    from_description,
    normalize_weights,
    one_draw,
    spectral_radius,
)

every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def tanh_layer(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(0.5 * z + x)


def implicit(solver: Solver | None = None) -> dict[str, Any]:
    """Forward and adjoint solves at the limit of float64."""
    solver = tight(Anderson() if solver is None else solver)
    return {"solver": solver, "gradient": ImplicitGradient(solver)}


def relative_error(found: Tensor, reference: Tensor) -> float:
    found, reference = found.detach().double(), reference.detach().double()
    return float((found - reference).norm() / reference.norm())


def dense_gradient(p: Problem, R: Tensor) -> Tensor:
    """d sum(R z*) / dx."""
    return p.dense_gradients(R)[-1]


def contracting(radius: float, batch: int = 4) -> Problem:
    """A tanh layer of 8 units whose weight has this norm."""
    g = generator(0)
    U = torch.eye(8, dtype=torch.float64)
    cell = InjectedTanhCell(contraction(8, radius), U, torch.zeros(8, dtype=torch.float64))
    x = 0.3 * torch.randn(batch, 8, dtype=torch.float64, generator=g)
    return Problem(cell, torch.zeros_like(x), (x.requires_grad_(),))


# ---------------------------------------------------------------------------------------------- silent wrong results


@every_solver
def test_W1_the_second_derivative_is_right(solver: Any) -> None:
    """The second derivative of an implicit gradient was -1.1999, without an error; it is -3.0676."""
    x = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    z, _ = fixed_point(tanh_layer, torch.zeros_like(x), x, **implicit(solver))
    (first,) = torch.autograd.grad(z, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert second.item() == pytest.approx(-3.0676, abs=1e-4)


def test_W1_gradgradcheck() -> None:
    """By the input and by the parameters."""
    p = contracting(0.6, batch=1)
    deq = DEQ(p.cell, **implicit())
    assert torch.autograd.gradgradcheck(
        lambda x, *_: deq(x)[0], (p.inputs[0], *p.cell.parameters()), fast_mode=True, atol=1e-6
    )


@pytest.mark.parametrize("radius", [0.3, 0.6])
@pytest.mark.parametrize("sliced", [False, True])
def test_W2_states_on_the_way_do_not_change_the_gradient_of_an_early_solution(radius: float, sliced: bool) -> None:
    """With states on the way, an early end dropped the implicit gradient (error 0.45), and states with it."""
    p = contracting(radius)
    R = p.weights()
    solver = FixedPointIteration(tol=1e-13, max_steps=400, check_every=1)
    steps = (2, 100, 200, 300)
    z, report, states = DEQ(p.cell, solver, ImplicitGradient(tight(GMRES())))(
        *p.inputs, trajectory=Trajectory(steps, sliced=sliced)
    )
    assert report.evaluations < 100
    assert len(states) == len(steps)
    assert report.residual.tolist() == pytest.approx(residual(p.cell, z, *p.inputs, norm="relative").tolist())
    (found,) = torch.autograd.grad((R * z).sum(), p.inputs)
    assert relative_error(found, dense_gradient(p, R)) < 1e-7
    for state in states[1:]:
        torch.testing.assert_close(state, z, rtol=0, atol=1e-12)
        assert state.requires_grad


def test_W3_several_forwards_before_a_backward() -> None:
    """Two forwards of one module before a backward pass (siamese nets, accumulation) recursed without end."""
    p = contracting(0.6)
    deq = DEQ(p.cell, **implicit())
    a, b = p.inputs[0].detach().requires_grad_(), p.inputs[0].detach().flip(0).requires_grad_()
    expected = []
    for x in (a, b):
        expected += torch.autograd.grad(deq(x)[0].square().sum(), x)
    za, zb = deq(a)[0], deq(b)[0]
    found = torch.autograd.grad(za.square().sum() + zb.square().sum(), (a, b))
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


def test_W3_a_second_backward_pass_gives_the_same() -> None:
    """With retain_graph the second gradient was that of one step, 37 % off."""
    p = contracting(0.9)
    R = p.weights()
    loss = (R * DEQ(p.cell, **implicit())(*p.inputs)[0]).sum()
    for retain in (True, True, False):
        (found,) = torch.autograd.grad(loss, p.inputs, retain_graph=retain)
        assert relative_error(found, dense_gradient(p, R)) < 1e-10


class Saved:
    """One tensor that a graph keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def test_W3_forwards_without_a_backward_leave_nothing() -> None:
    """The graphs of forwards whose backward never came stayed alive, even after garbage collection."""
    p = contracting(0.6)
    deq = DEQ(p.cell, **implicit())
    references = []

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        references.append(weakref.ref(saved))
        return saved

    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            for _ in range(5):
                deq(*p.inputs)
        assert len(references) >= 5
        assert not any(reference() for reference in references)
    finally:
        gc.enable()


@pytest.mark.parametrize("solver", [FixedPointIteration(max_steps=500), Anderson(), Broyden(), GMRES()], ids=str)
def test_W4_the_gradient_does_not_depend_on_the_scale_of_the_loss(solver: Any) -> None:
    """An absolute tolerance of the adjoint lost the gradient of small losses: error 0.89 at a factor of 1e-8."""
    p = contracting(0.95)
    R = p.weights()
    deq = DEQ(p.cell, tight(Anderson()), ImplicitGradient(replace(solver, tol=1e-8)))
    reference = dense_gradient(p, R)
    evaluations = set()
    for scale in (1e4, 1.0, 1e-2, 1e-4, 1e-6, 1e-8):
        (found,) = torch.autograd.grad(scale * (R * deq(*p.inputs)[0]).sum(), p.inputs)
        assert relative_error(found / scale, reference) < 1e-6
        assert deq.adjoint_report is not None
        evaluations.add(deq.adjoint_report.evaluations)
    assert len(evaluations) == 1


@every_solver
def test_W5_the_tolerance_does_not_depend_on_the_size_of_the_state(solver: Any) -> None:
    """The same problem entry by entry took 17, 24 and 32 evaluations at 16, 1024 and 65536 entries."""
    if isinstance(solver, Newton):
        pytest.skip("a dense Jacobian of 65536 entries")
    W = contraction(16, 0.8, dtype=torch.float32)
    evaluations = []
    for d in (16, 1024, 65536):
        x = torch.randn(1, 16, generator=generator(1)).repeat(1, d // 16)
        _, report = fixed_point(
            lambda z, x: torch.tanh(z.view(-1, 16) @ W.mT + x.view(-1, 16)).view_as(z),
            torch.zeros_like(x),
            x,
            solver=replace(solver, tol=1e-3),
        )
        assert report.converged.all()
        evaluations.append(report.evaluations)
    assert max(evaluations) - min(evaluations) <= 1


@every_solver
@pytest.mark.parametrize("gain", [0.9, 3.0], ids=["contractive", "expanding"])
def test_W6_the_residual_is_that_of_the_state_returned(solver: Any, gain: float) -> None:
    """The residual of another state was reported: 11.3 where 19.8 was true."""
    W = gain * contraction(8, 1.0)
    x = 10 * torch.randn(4, 8, dtype=torch.float64, generator=generator(1))

    def f(z: Tensor, x: Tensor) -> Tensor:
        return z @ W.mT + 3 * torch.sin(z) * (gain > 1) + x

    for norm in ("absolute", "relative"):
        z, report = fixed_point(
            f, torch.zeros_like(x), x, solver=replace(solver, norm=norm, max_steps=7), on_failure="ignore"
        )
        torch.testing.assert_close(report.residual, residual(f, z, x, norm=norm), rtol=1e-9, atol=1e-12)


class Faulty:
    """f, with one evaluation of one sample that is not a number."""

    def __init__(self, f: Any, at: int) -> None:
        self.f, self.at, self.calls = f, at, 0

    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor:
        fz: Tensor = self.f(z, *inputs)
        if self.calls == self.at:
            fz = fz.clone()
            fz[0] = torch.nan
        self.calls += 1
        return fz

    def jacobian(self, z: Tensor, *inputs: Tensor) -> Tensor:
        J: Tensor = self.f.jacobian(z, *inputs)
        return J


@every_solver
def test_W7_one_bad_evaluation_does_not_poison_the_best_state(solver: Any) -> None:
    """One NaN at step 5 made the best state of its sample NaN, and the whole batch ran to its last step."""
    p = contracting(0.9)
    at = 2 if isinstance(solver, Newton) else 5
    solver = replace(solver, tol=1e-12, max_steps=500)
    with torch.no_grad():
        clean, clean_report = fixed_point(p.cell, p.z0, *p.inputs, solver=solver)
        f = Faulty(p.cell, at)
        z, report = fixed_point(f, p.z0, *p.inputs, solver=solver, on_failure="ignore", trace=True)
    assert clean_report.steps[0] > at
    assert torch.equal(z[1:], clean[1:])
    assert report.status.tolist() == [SolverStatus.NON_FINITE, 0, 0, 0]
    assert z[0].isfinite().all()
    seen = report.trace[:, 0]
    assert report.residual[0] == seen[seen.isfinite()].min()
    assert report.residual[0] < seen[0], "the best state is not the start"
    torch.testing.assert_close(report.residual, residual(p.cell, z, *p.inputs, norm="relative"), rtol=1e-9, atol=1e-15)
    assert report.evaluations <= clean_report.evaluations


@pytest.mark.parametrize("degrees", [30, 60, 90])
def test_W8_the_spectral_radius_of_a_rotation(degrees: float) -> None:
    """For complex eigenvalues of size 0.9 the power method gave 0.779, 0.450 and 0.000."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    A = 0.9 * torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    for copies in (1, 50):
        J = torch.block_diag(*[A] * copies)
        radius = spectral_radius(lambda z: z @ J.mT, torch.zeros(3, 2 * copies, dtype=torch.float64))  # noqa: B023
        torch.testing.assert_close(radius, torch.full((3,), 0.9, dtype=torch.float64), rtol=0, atol=1e-9)


def test_W8_the_spectral_radius_of_a_map_that_does_not_depend_on_z() -> None:
    """A Jacobian of zeros gave NaN."""
    x = torch.ones(3, 4)
    assert spectral_radius(lambda z, x: 0 * z + x, torch.zeros(3, 4), x).tolist() == [0, 0, 0]
    assert spectral_radius(lambda z, x: 2 * x, torch.zeros(3, 4), x).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Anderson(f_max_iters=100),  # type: ignore[call-arg]
        lambda: FixedPointIteration(stop_mode="rel"),  # type: ignore[call-arg]
        lambda: ImplicitGradient(f_anderson_m=5),  # type: ignore[call-arg]
        lambda: DEQ(LinearCell(torch.eye(2)), f_max_iters=100),  # type: ignore[call-arg]
        lambda: DEQ(LinearCell(torch.eye(2)))(torch.ones(1, 2), solver_kwargs={"tau": 1}),
        lambda: fixed_point(tanh_layer, torch.zeros(1, 2), torch.ones(1, 2), stop_mode="rel"),  # type: ignore[call-overload]
        lambda: normalize_weights(nn.Linear(2, 2), "weight", clip=True),  # type: ignore[call-arg]
    ],
)
def test_W9_unknown_options_raise(make: Callable[[], Any]) -> None:
    """A mistyped option was ignored: f_max_iters=100 left the 40 steps as they were."""
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        make()


def test_W9_unknown_options_in_a_configuration_raise_and_name_the_nearest() -> None:
    """So it was in configurations: stop_mode was ignored, and a user took it for a bug of the stopping rule."""
    with pytest.raises(ValueError, match=r"Anderson has no argument 'max_step'. Did you mean 'max_steps'\?"):
        from_description({"class_path": "Anderson", "init_args": {"max_step": 100}}, Solver)
    with pytest.raises(ValueError, match=r"unknown solver 'anderso'. Did you mean 'Anderson'\?"):
        from_description("anderso", Solver)
    with pytest.raises(ValueError, match="Broyden has no argument 'LBFGS_thres'"):
        from_description(
            {
                "class_path": "ImplicitGradient",
                "init_args": {"solver": {"class_path": "Broyden", "init_args": {"LBFGS_thres": 10}}},
            },
            Gradient,
        )
    with pytest.raises(ValueError, match=r"given besides: \['tol'\]"):
        from_description({"class_path": "Anderson", "tol": 1e-3}, Solver)


def test_W10_the_configuration_of_the_caller_stays_as_it_is() -> None:
    """An override was written into the caller's configuration, and the next model had it too."""
    description = {"class_path": "ImplicitGradient", "init_args": {"solver": describe(Anderson(max_steps=9))}}
    before = copy.deepcopy(description)
    gradient = from_description(description, Gradient)
    p = contracting(0.5)
    first = DEQ(p.cell, Anderson(max_steps=40), gradient)
    second = DEQ(p.cell, replace(first.solver, max_steps=7), gradient)
    first(*p.inputs)[0].sum().backward()
    assert description == before
    assert (first.solver.max_steps, second.solver.max_steps) == (40, 7)
    with pytest.raises(FrozenInstanceError):
        first.solver.max_steps = 7  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        gradient.solver = Newton()  # type: ignore[attr-defined]


@every_solver
def test_W11_a_forward_solve_that_does_not_converge_warns(solver: Any) -> None:
    """Three iterations at a tolerance of 1e-9 said nothing."""
    p = contracting(0.95)
    short = replace(solver, tol=1e-30, max_steps=3)
    with pytest.warns(ConvergenceWarning, match=r"fixed-point solve .* did not converge .*MAX_STEPS"):
        _, report = DEQ(p.cell, short)(*p.inputs)
    assert not report.converged.any()
    assert report.status.tolist() == [SolverStatus.MAX_STEPS] * 4


@pytest.mark.parametrize("solver", [Anderson(), FixedPointIteration(), Broyden(), GMRES()], ids=str)
def test_W11_an_adjoint_solve_that_does_not_converge_warns(solver: Any) -> None:
    """Nor did two iterations of the adjoint at 1e-12."""
    p = contracting(0.95)
    deq = DEQ(p.cell, tight(Anderson()), ImplicitGradient(replace(solver, tol=1e-12, max_steps=2)))
    z, report = deq(*p.inputs)
    assert report.converged.all()
    with pytest.warns(ConvergenceWarning, match=r"adjoint solve .* did not converge"):
        z.sum().backward()
    assert deq.adjoint_report is not None
    assert not deq.adjoint_report.converged.any()


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.Dropout(0.1), "Dropout"), (nn.BatchNorm1d(4), "BatchNorm1d"), (nn.SyncBatchNorm(4), "SyncBatchNorm")],
)
def test_W11_cells_that_change_from_one_evaluation_to_the_next_are_refused(layer: nn.Module, name: str) -> None:
    """Dropout never converged (1.16), and the statistics of BatchNorm moved 21 times in a forward, in silence."""
    deq = DEQ(LayerCell(nn.Sequential(nn.Linear(4, 4), layer)))
    with pytest.raises(ValueError, match=f"the cell holds a {name} .*use "):
        deq(torch.ones(3, 4))
    _, report = deq.eval()(torch.ones(3, 4))
    assert report.converged.all()


@every_solver
def test_W12_states_on_the_way_are_not_off_by_one(solver: Any) -> None:
    """The states that Broyden was asked for were those of one step earlier: 3.0e-2 from the right ones."""
    p = contracting(0.9)
    arguments = []

    def f(z: Tensor, x: Tensor) -> Tensor:
        arguments.append(z)
        fz: Tensor = p.cell(z, x)
        return fz

    steps = (1, 2, 3, 5, 8)
    solver = replace(solver, tol=1e-30, max_steps=8, **({"mix_every": 1} if isinstance(solver, Anderson) else {}))
    if isinstance(solver, FixedPointIteration):
        solver = replace(solver, check_every=1)
    with torch.no_grad():
        z, report, states = fixed_point(
            f, p.z0, *p.inputs, solver=solver, on_failure="ignore", trace=True, trajectory=steps
        )
    for k, state in zip(steps, states, strict=True):
        # Newton has arrived by 8, and its Jacobians take evaluations too.
        if not isinstance(solver, Newton):
            assert torch.equal(state, arguments[k])
        torch.testing.assert_close(
            residual(p.cell, state, *p.inputs, norm="relative"), report.trace[k], rtol=1e-6, atol=1e-15
        )
    best = report.trace.argmin(dim=0)
    for b in range(4):
        if best[b] in steps:
            assert torch.equal(z[b], states[steps.index(int(best[b]))][b])


@every_solver
def test_W13_a_map_that_changes_the_shape_is_refused(solver: Any) -> None:
    """f from (4, 8) to (8, 4) was accepted, and the result had the other shape."""
    with pytest.raises(ValueError, match=r"keep the shape of the state: state has shape \(4, 8\).*shape \(8, 4\)"):
        fixed_point(lambda z: 0.5 * z.reshape(8, 4), torch.ones(4, 8), solver=solver)


def test_W14_the_norm_is_bounded_at_the_first_forward() -> None:
    """After one, two and three forwards the norm of a weight bounded by 1 was 1.40, 1.20 and 1.13."""
    linear = nn.Linear(30, 30).double()
    with torch.no_grad():
        linear.weight.normal_()
    raw = linear.weight
    normalize_weights(linear, "contractive", bound=1.0)
    seen = []

    class Cell(LayerCell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            seen.append(linear.weight)
            return super().forward(z, x)

    deq = DEQ(Cell(linear), Anderson(max_steps=100))
    deq(torch.ones(2, 30, dtype=torch.float64))[0].sum().backward()
    for W in seen:
        assert float(torch.linalg.matrix_norm(W.detach(), ord=2)) == pytest.approx(1.0, abs=1e-12)
    assert raw.grad is not None
    assert raw.grad.abs().max() > 0
    assert {tensor.dtype for tensor in (*seen, *linear.state_dict().values())} == {torch.float64}


def test_W14_the_norm_of_a_convolution_is_that_of_the_operator() -> None:
    """A kernel whose matrix had norm 1 had an operator of norm 1.62."""
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
    with torch.no_grad():
        conv.weight.normal_()
    kernel = conv.weight.detach().flatten(1)
    with torch.no_grad():
        conv.weight /= torch.linalg.matrix_norm(kernel, ord=2)
    assert operator_norm(conv) > 1.2
    parametrize.register_parametrization(conv, "weight", ConvolutionBound(1.0))
    assert 0.85 < operator_norm(conv) <= 1 + 1e-12


def operator_norm(conv: nn.Conv2d, size: int = 8) -> float:
    """Of a convolution on images of this size, from its dense matrix."""
    images = torch.eye(3 * size**2, dtype=torch.float64).view(-1, 3, size, size)
    with torch.no_grad():
        return float(torch.linalg.matrix_norm(conv(images).flatten(1), ord=2))


# ------------------------------------------------------------------------------------------- samples that share a batch


def easy_and_hard() -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """Three samples with a spectral radius of 0.2, and one with 0.99."""
    A = contraction(8, 1.0)
    Q = torch.linalg.qr(A).Q
    x = torch.randn(4, 8, dtype=torch.float64, generator=generator(1))
    radius = torch.tensor([[0.2], [0.2], [0.2], [0.99]], dtype=torch.float64)
    return lambda z, x, radius: radius * (z @ Q) + x, x, radius


@every_solver
def test_S1_a_hard_sample_does_not_keep_the_others_iterating(solver: Any) -> None:
    """Three easy samples took 23 evaluations beside a hard one, and 5 alone."""
    f, x, radius = easy_and_hard()
    f = Counting(f)
    solver = replace(solver, tol=1e-3, max_steps=2000)
    _, alone = fixed_point(f, torch.zeros_like(x[:3]), x[:3], radius[:3], solver=solver)
    f.calls = 0
    _, report = fixed_point(f, torch.zeros_like(x), x, radius, solver=replace(solver, compact=True))
    assert report.steps[:3].tolist() == alone.steps.tolist()
    if not isinstance(solver, Newton):  # the map is linear: one step for all
        assert report.evaluations > alone.evaluations
    assert report.row_evaluations <= 3 * alone.evaluations + report.evaluations


@every_solver
def test_S1_sample_evaluations_are_not_wasted(solver: Any) -> None:
    """With radii from 0.77 to 0.95 more than half of plain iteration's evaluations were of samples that had arrived."""
    g = generator(0)
    W = contraction(50, 1.0)
    gain = torch.linspace(0.77, 0.95, 16, dtype=torch.float64).unsqueeze(1)
    x = 0.05 * torch.randn(16, 50, dtype=torch.float64, generator=g)
    solver = replace(solver, tol=1e-8, max_steps=2000, compact=True)
    _, report = fixed_point(
        lambda z, x, gain: torch.tanh(gain * (z @ W.mT) + x), torch.zeros_like(x), x, gain, solver=solver
    )
    needed = int((report.steps + 1).sum())
    assert report.converged.all()
    assert needed <= report.row_evaluations
    if report.evaluations > 6:
        assert report.row_evaluations - needed < 0.15 * report.row_evaluations


@every_solver
def test_S2_a_result_does_not_depend_on_the_batch(solver: Any) -> None:
    """Easy samples moved by up to 8e-4 with their batch mates, at a tolerance of 1e-3."""
    f, x, radius = easy_and_hard()
    solver = replace(solver, tol=1e-3, max_steps=2000)
    together, report = fixed_point(f, torch.zeros_like(x), x, radius, solver=solver)
    for b in range(3):
        row = slice(b, b + 1)
        z, alone = fixed_point(f, torch.zeros_like(x[row]), x[row], radius[row], solver=solver)
        assert relative_error(together[row], z) < 1e-12
        assert report.steps[b] == alone.steps[0]
    swapped = radius.clone()
    swapped[3] = 0.3
    other, _ = fixed_point(f, torch.zeros_like(x), x, swapped, solver=solver)
    assert torch.equal(other[:3], together[:3])


@every_solver
def test_S3_iterates_do_not_depend_on_the_batch(solver: Any) -> None:
    """A line search over the whole batch coupled iterates: after 6 steps they differed by 1.66 from those alone."""
    f, x, radius = easy_and_hard()
    x = x * torch.tensor([[1e-3], [1.0], [10.0], [1e3]], dtype=torch.float64)
    solver = replace(solver, tol=0, max_steps=6)
    with torch.no_grad():
        *_, (together,) = fixed_point(
            f, torch.zeros_like(x), x, radius, solver=solver, on_failure="ignore", trajectory=[6]
        )
        for b in range(4):
            row = slice(b, b + 1)
            *_, (z,) = fixed_point(
                f, torch.zeros_like(x[row]), x[row], radius[row], solver=solver, on_failure="ignore", trajectory=[6]
            )
            assert relative_error(together[row], z) < 1e-12


# ------------------------------------------------------------------------------------------- what was missing or failed


class LayerCell(nn.Module):
    """tanh(layer(z) / 2 + x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.layer(z) + x)

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


GRADIENTS = {
    "implicit": ImplicitGradient(tight(Anderson())),
    "neumann": NeumannGradient(60),
    "phantom": PhantomGradient(60),
    "unrolled": UnrolledGradient(),
}
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)


def equilibrium(x: Tensor, gradient: Any) -> Tensor:
    z: Tensor
    z, _ = fixed_point(tanh_layer, torch.zeros_like(x), x, solver=tight(Anderson()), gradient=gradient)
    return z


def slope(x: Tensor) -> Tensor:
    """dz*/dx by hand."""
    z = equilibrium(x.detach(), ImplicitGradient())
    s = 1 - z.square()
    return s / (1 - s / 2)


@every_gradient
def test_M01_torch_func_grad(gradient: Any) -> None:
    """Every transform of torch.func failed on implicit gradients."""
    x = torch.randn(3, 4, dtype=torch.float64)
    found = torch.func.grad(lambda x: equilibrium(x, gradient).sum())(x)
    torch.testing.assert_close(found, slope(x), rtol=0, atol=1e-9)


@every_gradient
def test_M01_torch_func_grad_of_functional_call(gradient: Any) -> None:
    """With weights that the module does not have, and that are only there during the call."""
    p = contracting(0.6)
    deq = DEQ(p.cell, tight(Anderson()), gradient)
    parameters = {name: 0.5 * value.detach() for name, value in deq.named_parameters()}
    (x,) = (x.detach() for x in p.inputs)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(deq, parameters, (x,))[0].square().sum()

    found = torch.func.grad(loss)(parameters)
    other = copy.deepcopy(deq)  # what it keeps of the call can be copied
    other.load_state_dict(parameters)
    other(x)[0].square().sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch.func's own first use
@every_gradient
@pytest.mark.parametrize("transform", ["vjp", "jvp", "dual", "jacrev", "vmap"])
def test_M01_other_transforms_are_right_or_refused(gradient: Any, transform: str) -> None:
    """What is not supported says so, and what to do instead."""
    x = torch.randn(3, 4, dtype=torch.float64)
    ones = torch.ones_like(x)

    def solve(x: Tensor) -> Tensor:
        return equilibrium(x, gradient)

    def dual() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(solve(forward_ad.make_dual(x, ones))).tangent

    found: dict[str, Callable[[], Tensor]] = {
        "vjp": lambda: torch.func.vjp(solve, x)[1](ones)[0],
        "jvp": lambda: torch.func.jvp(solve, (x,), (ones,))[1],
        "dual": dual,
        "jacrev": lambda: torch.func.jacrev(solve)(x).sum(dim=(0, 1)),
        "vmap": lambda: torch.func.grad(lambda x: torch.vmap(lambda x: solve(x.unsqueeze(0)))(x).sum())(x),
    }
    try:
        result = found[transform]()
    except NotImplementedError as refusal:
        assert not (transform in {"vjp", "jvp", "dual"} and isinstance(gradient, UnrolledGradient))
        assert "torch.autograd" in str(refusal)  # noqa: PT017
    else:
        torch.testing.assert_close(result, slope(x), rtol=0, atol=1e-9)


@every_gradient
def test_M02_gradients_exist_in_eval_mode(gradient: Any) -> None:
    """In eval mode no result had a gradient: no forces from a trained potential."""
    p = contracting(0.6)
    deq = DEQ(p.cell, tight(Anderson()), gradient)
    found = [torch.autograd.grad(deq.train(mode)(*p.inputs)[0].sum(), p.inputs)[0] for mode in (True, False)]
    assert torch.equal(*found)
    assert found[0].abs().max() > 0.1
    with torch.no_grad():
        assert not deq.train()(*p.inputs)[0].requires_grad


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # torch.compile's own
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_M03_compiled_cells() -> None:
    """A compiled model was cut into 16 graphs, and hit the limit of recompilation."""
    p = contracting(0.6)
    expected, _ = DEQ(p.cell, **implicit())(*p.inputs)
    reference = torch.autograd.grad(expected.sum(), [*p.inputs, *p.cell.parameters()])
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    deq = DEQ(p.cell, **implicit())
    deq.cell.compile(backend=backend, fullgraph=True, dynamic=False)
    for _ in range(3):
        z, report = deq(*p.inputs)
        found = torch.autograd.grad(z.sum(), [*p.inputs, *p.cell.parameters()])
    torch.compiler.reset()
    assert report.converged.all()
    assert len(graphs) <= 2  # with and without gradients
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-10)
    for ours, dense in zip(found, reference, strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-9)


class ConvCell(nn.Module):
    """tanh(2 norm(conv(z) + x) + x)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(2 * self.norm(self.conv(z) + x) + x)

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def wide_tanh() -> tuple[nn.Module, Tensor]:
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight.copy_(1.6 * torch.linalg.qr(contraction(64, 1.0)).Q)  # halved in the cell
    return LayerCell(linear), 0.3 * torch.randn(8, 64, generator=generator(1))


def small_conv() -> tuple[nn.Module, Tensor]:
    return ConvCell(), torch.randn(4, 8, 8, 8, generator=generator(1))


@pytest.mark.parametrize("make", [wide_tanh, small_conv])
@pytest.mark.parametrize(
    "solver", [Anderson(), FixedPointIteration(), Broyden(), GMRES()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_M04_autocast_forward_and_backward_outside(make: Any, solver: Any, inside: bool) -> None:
    """Forward in bfloat16 autocast and backward outside, as bf16-mixed training has it, crashed.

    Spectral radii are 0.73 and 0.61. Measured errors are up to 0.5 %, and 1.3 % for the convolution's (small) bias.
    """
    cell, x = make()
    x.requires_grad_()
    leaves = [x, *cell.parameters()]
    exact, _ = DEQ(cell, Anderson(tol=1e-6), ImplicitGradient(Anderson(tol=1e-6)))(x)
    references = torch.autograd.grad(exact.square().sum(), leaves)
    deq = DEQ(cell, Anderson(tol=1e-3), ImplicitGradient(replace(solver, tol=1e-3)), on_failure="ignore")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, report = deq(x)
    assert z.dtype == report.residual.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16) if inside else nullcontext():
        found = torch.autograd.grad(z.square().sum(), leaves)
    assert relative_error(z, exact) < 0.01
    for ours, reference in zip(found, references, strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, reference) < 0.02


@every_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_M05_narrow_states(solver: Any, dtype: torch.dtype) -> None:
    """Anderson crashed on states of 16 bits, for want of a factorisation."""
    cell, x = wide_tanh()
    exact, _ = DEQ(cell, Anderson(tol=1e-6))(x)
    z, report = DEQ(cell.to(dtype), replace(solver, tol=1e-2), ImplicitGradient(replace(solver, tol=1e-2)))(x.to(dtype))
    assert z.dtype == dtype
    assert report.converged.all()
    assert relative_error(z, exact) < 0.05  # tol / (1 - 0.8)
    z.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in cell.parameters())


def test_M06_recomputed_activations_have_the_same_random_draws() -> None:
    """Recomputation drew other dropout masks than the forward had (1.85 apart)."""
    cell = LayerCell(nn.Sequential(nn.Linear(6, 6), VariationalDropout(0.5))).double()
    x = torch.randn(4, 6, dtype=torch.float64)

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(5)
        z, _ = DEQ(cell, recompute=recompute, **implicit())(x)
        torch.rand(7)  # the generator has moved on by the time of the backward pass
        return list(torch.autograd.grad(z.square().sum(), list(cell.parameters())))

    for recomputed, kept in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(recomputed, kept)


def test_M06_a_random_map_is_recomputed_with_its_draws() -> None:
    """Also those that no module of ours makes."""
    x = torch.ones(4, 6, requires_grad=True)

    def gradient(recompute: bool) -> Tensor:
        torch.manual_seed(5)
        z, _ = fixed_point(
            lambda z, x: nn.functional.dropout(x.exp(), 0.5),
            torch.zeros(4, 6),
            x,
            solver=FixedPointIteration(max_steps=0),
            gradient=PhantomGradient(3),
            recompute=recompute,
            on_failure="ignore",
        )
        torch.rand(7)
        return torch.autograd.grad(z.sum(), x)[0]

    assert torch.equal(gradient(True), gradient(False))
    assert 0 < int((gradient(True) == 0).sum()) < 24


def test_M06_recomputed_activations_are_in_the_same_precision() -> None:
    """The forward was in bfloat16, and what was recomputed in float32."""
    cell, x = wide_tanh()
    dtypes = []
    cell.layer.register_forward_hook(lambda _, __, y: dtypes.append(y.dtype))
    found = []
    for recompute in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, _ = DEQ(cell, recompute=recompute, on_failure="ignore")(x)
        found.append(torch.autograd.grad(z.sum(), list(cell.parameters())))
    assert set(dtypes) == {torch.bfloat16}
    for recomputed, kept in zip(*found, strict=True):
        assert torch.equal(recomputed, kept)


def test_M06_tensors_that_f_closes_over_get_their_gradient() -> None:
    """With recomputation they got none, in silence; and only modules could be recomputed."""
    W = contraction(5, 0.6).requires_grad_()
    x = torch.randn(3, 5, dtype=torch.float64)
    found = []
    for recompute in (True, False):
        z, _ = fixed_point(
            lambda z, x: torch.tanh(z @ W.mT + x), torch.zeros_like(x), x, recompute=recompute, **implicit()
        )
        found += torch.autograd.grad(z.sum(), W)
    assert torch.equal(*found)
    assert found[0].abs().max() > 0.1


def test_M06_recomputation_has_second_derivatives() -> None:
    """It had none."""
    x = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    z, _ = fixed_point(tanh_layer, torch.zeros_like(x), x, recompute=True, **implicit())
    (first,) = torch.autograd.grad(z, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert second.item() == pytest.approx(-3.0676, abs=1e-4)


def saved_and_loaded(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def solved(kind: Any) -> tuple[DEQ, Tensor]:
    """A DEQ that has been solved and differentiated, with normalised weights if a kind is given."""
    cell = LayerCell(nn.Linear(4, 4)).double()
    if kind is not None:
        normalize_weights(cell, kind, bound=0.9 if kind == "contractive" else None)
    deq = DEQ(cell, **implicit())
    x = torch.randn(3, 4, dtype=torch.float64)
    deq(x)[0].sum().backward()
    return deq.eval(), x


KINDS = [None, "weight", "spectral", "contractive"]


@pytest.mark.parametrize(
    ("copying", "kinds"),
    [
        (copy.deepcopy, KINDS),
        (lambda deq: pickle.loads(pickle.dumps(deq)), [None]),  # noqa: S301
        (saved_and_loaded, [None]),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_M07_copies_and_pickles(copying: Any, kinds: list[Any]) -> None:
    """A DEQ could not be pickled or saved, and one with normalised weights not even copied (EMA, SWA)."""
    for kind in kinds:
        deq, x = solved(kind)
        twin = copying(deq)
        assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in deq.parameters()})
        assert torch.equal(twin(x)[0], deq(x)[0])
        assert isinstance(twin.report, SolverReport)


@pytest.mark.parametrize("kind", KINDS)
def test_M07_weights_are_saved_and_loaded(kind: Any) -> None:
    """Torch itself does not pickle modules with parametrised weights, and says to save the weights."""
    deq, x = solved(kind)
    if kind is not None:
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            pickle.dumps(deq)
    other, _ = solved(kind)
    assert not torch.equal(other(x)[0], deq(x)[0])
    other.load_state_dict(saved_and_loaded(deq.state_dict()))
    assert torch.equal(other(x)[0], deq(x)[0])


@pytest.mark.parametrize("shared_dims", [(), 1, 2])
def test_M08_variational_dropout_is_on_any_device_in_any_dtype_and_batch(shared_dims: Any) -> None:
    """Masks were on the CPU, in float32 and of the first batch: all else crashed, or changed its dtype."""
    dropout = VariationalDropout(0.5, shared_dims)
    with one_draw():
        for batch in (8, 3):  # the last batch of an epoch is smaller, and nobody resets anything
            y = dropout(torch.ones(batch, 5, 6, dtype=torch.bfloat16))
            assert (y.dtype, y.shape) == (torch.bfloat16, (batch, 5, 6))
            assert set(y.unique().tolist()) <= {0.0, 2.0}
        y = dropout(torch.ones(8, 5, 6, device="meta"))
        assert y.device.type == "meta"
    assert not VariationalDropout(1.0, shared_dims)(torch.ones(8, 5, 6)).any(), "p = 1 gave NaN"


def test_M08_a_solve_with_dropout_in_batches_of_different_sizes() -> None:
    """A smaller last batch crashed unless the masks were reset by hand."""
    deq = DEQ(LayerCell(nn.Sequential(nn.Linear(6, 6), VariationalDropout(0.5))))
    for batch in (8, 3):
        z, report = deq(torch.randn(batch, 6))
        assert report.converged.all()
        z.sum().backward()


@every_solver
@pytest.mark.parametrize("make", [tanh_problem, pair_problem, nested_problem])
def test_M09_empty_batches(solver: Any, make: Any) -> None:
    """An empty batch crashed in every solver."""
    p = make(batch=0)
    z, report = fixed_point(p.cell, p.z0, *p.inputs, **implicit(solver))
    assert flat(z).shape == flat(p.z0).shape
    assert report.converged.shape == (0,)
    flat(z).sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in p.cell.parameters())


@every_solver
@pytest.mark.parametrize("make", [pair_problem, nested_problem], ids=["tuple", "dict of a list"])
def test_M09_states_of_several_tensors(solver: Any, make: Any) -> None:
    """Dicts and nested states failed."""
    p = make()
    R = p.weights()
    z, report = fixed_point(p.cell, p.z0, *p.inputs, **implicit(solver))
    torch.testing.assert_close(flat(z), p.solution(), rtol=0, atol=1e-11)
    found = torch.autograd.grad((R * flat(z)).sum(), p.leaves)
    for ours, dense in zip(found, p.dense_gradients(R), strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-9)
    assert report.converged.all()


def test_M09_different_batch_sizes_are_named() -> None:
    """They gave an error of torch.cat."""
    with pytest.raises(ValueError, match=r"share batch dimension 0, but state\[0\] has shape \(4, 2\) and state\[1\]"):
        fixed_point(lambda z: z, (torch.zeros(4, 2), torch.zeros(3, 2)))


@every_solver
def test_M09_mixed_dtypes_stay(solver: Any) -> None:
    """All tensors of a state became float64 when one was, in silence."""
    seen = set()

    def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        seen.add((z[0].dtype, z[1].dtype))
        return torch.tanh(0.3 * z[1].float() + x), torch.cos(0.3 * z[0].double())

    x = torch.randn(3, 2, generator=generator(1))
    z, report = fixed_point(f, (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.float64)), x, solver=solver)
    assert seen == {(torch.float32, torch.float64)}
    assert (z[0].dtype, z[1].dtype) == (torch.float32, torch.float64)
    assert report.converged.all()


def test_M09_what_is_no_state_is_refused() -> None:
    """A state without dimensions came back with one; a complex one was solved with a wrong Gram matrix."""
    with pytest.raises(ValueError, match="state has no dimension; a state is batch first"):
        fixed_point(lambda z: 0.5 * z, torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"state has dtype torch\.complex64; a state holds real floating tensors"):
        fixed_point(lambda z: 0.5 * z, torch.ones(2, 3, dtype=torch.complex64))


@every_solver
def test_M09_channels_last_stays(solver: Any) -> None:
    """The result of a channels-last start was contiguous, and so was what f saw."""
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    formats = set()

    def f(z: Tensor, x: Tensor) -> Tensor:
        if not torch._C._functorch.is_functorch_wrapped_tensor(z):  # by which Newton has its Jacobian
            formats.add(z.is_contiguous(memory_format=torch.channels_last))
        return torch.tanh(0.5 * z.roll(1, dims=2) + x)

    z, report = fixed_point(f, torch.zeros_like(x), x, solver=solver)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert formats == {True}
    assert report.converged.all()


@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_M10_plain_iteration_of_a_tuple(damping: float) -> None:
    """With a tuple its implicit gradient, its spectral radius and its states on the way in eval mode all failed."""
    p = pair_problem()
    R = p.weights()
    solver = tight(FixedPointIteration(damping=damping))
    deq = DEQ(p.cell, solver, ImplicitGradient(solver)).eval()
    z, _, states = deq(*p.inputs, trajectory=[1, 5])
    assert [flat(state).shape for state in states] == [R.shape] * 2
    found = torch.autograd.grad((R * flat(z)).sum(), p.leaves)
    for ours, dense in zip(found, p.dense_gradients(R), strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-9)
    assert spectral_radius(p.cell, z, *p.inputs).shape == (2,)


@pytest.mark.parametrize("make", [tanh_problem, pair_problem, nested_problem])
def test_M11_spectral_radius_in_inference_mode(make: Any) -> None:
    """It raised."""
    p = make()
    with torch.no_grad():
        z, _ = fixed_point(p.cell, p.z0, *p.inputs, solver=tight(Anderson()))
        expected = spectral_radius(p.cell, z, *p.inputs, generator=generator(0))
    with torch.inference_mode():
        z, _ = fixed_point(p.cell, p.z0, *p.inputs, solver=tight(Anderson()))
        found = spectral_radius(p.cell, z, *p.inputs, generator=generator(0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    J = torch.autograd.functional.jacobian(p._flat_cell, p.solution())
    dense = torch.stack([torch.linalg.eigvals(J[b, :, b]).abs().max() for b in range(len(found))])
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=0)


@every_solver
@pytest.mark.parametrize("max_steps", [0, 1, 2])
def test_M12_small_budgets_return_the_best_state_seen(solver: Any, max_steps: int) -> None:
    """Anderson with one or two steps evaluated twice, and returned the start with a residual of 1e8."""
    p = contracting(0.9)
    z, report = fixed_point(
        p.cell, p.z0, *p.inputs, solver=replace(solver, tol=1e-30, max_steps=max_steps), on_failure="ignore", trace=True
    )
    seen = report.trace.nan_to_num(nan=torch.inf)
    assert report.evaluations == max_steps + 1
    assert torch.equal(report.residual, seen.amin(dim=0))
    torch.testing.assert_close(report.residual, residual(p.cell, z, *p.inputs, norm="relative"), rtol=1e-9, atol=1e-15)
    if max_steps:
        assert (report.residual < seen[0]).all()


@every_solver
def test_M12_slices_of_one_step_make_progress(solver: Any) -> None:
    """Slices shorter than three steps did nothing with Anderson, in silence."""
    p = contracting(0.9)
    solver = replace(solver, tol=1e-30, max_steps=6)
    _, report, states = fixed_point(
        p.cell, p.z0, *p.inputs, solver=solver, trajectory=Trajectory([1, 2, 4], sliced=True), on_failure="ignore"
    )
    residuals = [residual(p.cell, state, *p.inputs, norm="relative") for state in (p.z0, *states)]
    residuals.append(report.residual)
    floor = 1e-14 if isinstance(solver, Newton) else 0
    for before, after in itertools.pairwise(residuals):
        assert (after < before.clamp_min(floor)).all()


SLOW = ["gaussian", "orthogonal", "tanh"]


def slow_problem(name: str) -> tuple[nn.Module, Tensor]:
    """16 samples of 100 entries with spectral radii of 0.95: a Gaussian matrix, an orthogonal one, and a tanh layer."""
    g = generator(0)
    G = torch.randn(100, 100, dtype=torch.float64, generator=g)
    A = torch.linalg.qr(G).Q if name == "orthogonal" else G
    A = A * (0.95 / torch.linalg.eigvals(A).abs().max())
    x = torch.randn(16, 100, dtype=torch.float64, generator=g)
    if name == "tanh":
        return InjectedTanhCell(1.2 * A, 0.5 * torch.eye(100, dtype=torch.float64), x.new_zeros(100)), x
    return LinearCell(A), x


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("memory", [10, 30])
def test_M13_broyden_survives_the_end_of_its_memory(name: str, memory: int) -> None:
    """With a memory of 10 or 30 it gave NaN on all three, once the memory was full."""
    cell, x = slow_problem(name)
    with torch.no_grad():
        z, report = fixed_point(cell, torch.zeros_like(x), x, solver=Broyden(memory=memory, tol=1e-5, max_steps=600))
    assert report.steps.max() > memory
    assert report.converged.all()
    assert z.isfinite().all()
    assert (residual(cell, z, x, norm="relative") <= 1e-5).all()


def test_M14_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    """Processes whose solves take different numbers of evaluations wait for each other in no solve.

    A collective in f would, and so dead-lock; the usual one, SyncBatchNorm, is refused (W11).
    """
    deq, x = known_defects_ddp.deq_and_input()
    expected, _ = known_defects_ddp.gradients(deq, deq, x)
    assert len(expected) == 3
    command = [sys.executable, "-m", known_defects_ddp.__name__, "1", str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as other:
        results = [known_defects_ddp.in_process(0, str(tmp_path))]
        assert other.wait(timeout=60) == 0
    results.append(torch.load(tmp_path / "rank1.pt"))
    for found, _ in results:
        for ours, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)
    assert results[0][1] != results[1][1], "the numbers of evaluations"


@every_solver
def test_M15_gradcheck(solver: Any) -> None:
    """It passed at a tight tolerance; the error at the default one was 2.1e-4."""
    p = contracting(0.8, batch=2)
    deq = DEQ(p.cell, **implicit(solver))
    arguments = (p.inputs[0], *p.cell.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: deq(x)[0], arguments, fast_mode=True)
    R = p.weights()
    z, _ = DEQ(p.cell)(*p.inputs)
    (found,) = torch.autograd.grad((R * z).sum(), p.inputs)
    assert relative_error(found, dense_gradient(p, R)) < 2.1e-4


@every_gradient
def test_M16_gradients_of_parameters_only_and_of_nothing(gradient: Any) -> None:
    """A result on which nothing depends said that it required a gradient."""
    p = contracting(0.6)
    x = p.inputs[0].detach()
    deq = DEQ(p.cell, tight(Anderson()), gradient)
    R = p.weights()
    (R * deq(x)[0]).sum().backward()
    for parameter, dense in zip(p.cell.parameters(), p.dense_gradients(R), strict=False):
        torch.testing.assert_close(parameter.grad, dense, rtol=0, atol=1e-8)
    z, _ = deq.requires_grad_(requires_grad=False)(x)
    assert not z.requires_grad

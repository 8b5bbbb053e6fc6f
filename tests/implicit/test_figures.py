"""Acceptance figures that are counts: evaluations to a tolerance, worst sample, fixed seeds.

The figures of plain iteration, and those of other Anderson accelerations quoted below, say what a count is worth.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.problems import OUTLIERS, mixed
from tests.problems import generator, residual
from zoo.implicit import Anderson, FixedPointIteration, ImplicitGradient, Solver, SolverReport, fixed_point

TOLERANCES = [1e-3, 1e-5, 1e-8]


def tanh_layer() -> tuple[Tensor, Tensor]:
    """W and x of z = tanh(W z + x), n = 100, B = 16; the spectral radii of its Jacobians at z* go up to 0.95."""
    g = generator(0)
    W = torch.randn(100, 100, dtype=torch.float64, generator=g) / 10 * 1.139
    return W, 0.5 * torch.randn(16, 100, dtype=torch.float64, generator=g)


def solve(solver: Solver, tol: float, scale: float = 1.0) -> SolverReport:
    """The layer in units of ``scale``: z -> s f(z / s)."""
    W, x = tanh_layer()

    def f(z: Tensor, x: Tensor) -> Tensor:
        return scale * torch.tanh(z / scale @ W.mT + x)

    with torch.no_grad():
        z, report = fixed_point(f, torch.zeros_like(x), x, solver=replace(solver, tol=tol, max_steps=1000))
    assert (residual(f, z, x, norm="relative") <= 1.001 * tol).all()
    return report


def test_plain_iteration_on_the_tanh_layer() -> None:
    """Which says that it is the layer that the figures are of."""
    counts = [solve(FixedPointIteration(check_every=1), tol).evaluations for tol in TOLERANCES]
    assert counts[:2] == [99, 189]
    assert abs(counts[2] - 323) <= 1


def test_anderson_on_the_tanh_layer() -> None:
    """An absolute ridge of 1e-4 takes 58, 195 and 408 (TorchDEQ's default), more than plain iteration at the last."""
    low, middle, high = (solve(Anderson(), tol).evaluations for tol in TOLERANCES)
    assert low <= 40
    assert middle <= 64
    assert high <= 98


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1e-1, 1e1, 1e2, 1e3])
def test_anderson_does_not_know_the_unit(scale: float) -> None:
    """An absolute ridge takes from 292 (s = 1e-3) to 69 evaluations (s = 1e3) to 1e-5."""
    for tol in (1e-5, 1e-8):
        assert abs(solve(Anderson(), tol, scale).evaluations - solve(Anderson(), tol).evaluations) <= 2


@pytest.mark.parametrize(("tol", "figure"), [(1e-3, 30), (1e-6, 45)])
def test_anderson_on_a_spectrum_like_those_of_trained_layers(tol: float, figure: int) -> None:
    """Radius 0.98, ten eigenvalues above a bulk of 0.4; plain iteration takes 97 and 355."""
    p = OUTLIERS.problem()
    with torch.no_grad():
        z, report = fixed_point(p.f, p.z0, *p.inputs, solver=Anderson(tol=tol, max_steps=1000))
    assert (residual(p.f, z, *p.inputs, norm="relative") <= 1.001 * tol).all()
    assert report.evaluations <= figure


@pytest.mark.parametrize("loss_scale", [1e-8, 1e-6, 1e-4, 1e-2, 1e2, 1e4])
def test_the_gradient_does_not_depend_on_the_loss_scale(loss_scale: float) -> None:
    """An absolute tolerance of 1e-6 is wrong by 11 % at 1e-6, and by 89 % at 1e-8."""

    def gradients(scale: float) -> list[Tensor]:
        W, x = (part.requires_grad_() for part in tanh_layer())
        z, _ = fixed_point(
            lambda z, x: torch.tanh(z @ W.mT + x),
            torch.zeros_like(x),
            x,
            solver=Anderson(tol=1e-6, max_steps=200),
            gradient=ImplicitGradient(Anderson(max_steps=200)),
        )
        found = torch.autograd.grad(scale * z.square().mean(), (W, x))
        return [gradient / scale for gradient in found]

    for found, reference in zip(gradients(loss_scale), gradients(1.0), strict=True):
        assert (found - reference).norm() <= 1e-6 * reference.norm()


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_a_batch_of_mixed_difficulty_is_not_paid_for_by_its_hardest_sample(tol: float) -> None:
    """16 samples of radii from 0.2 to 0.98. Each ends after its own steps, which is 67 % less than all of the batch;
    and compact=True evaluates hardly more rows than that (6 %: a row may wait until others go with it)."""
    p = mixed()
    reports: dict[bool, Any] = {}
    for compact in (False, True):
        solver = Anderson(tol=tol, max_steps=300, compact=compact)
        with torch.no_grad():
            reports[compact] = fixed_point(p.f, p.z0, *p.inputs, solver=solver)[1]
    whole, compacted = reports[False], reports[True]
    assert whole.row_evaluations == 16 * whole.evaluations
    needed = int((whole.steps + 1).sum())
    assert needed <= 0.55 * whole.row_evaluations
    assert needed <= compacted.row_evaluations <= 1.1 * needed

"""The Jacobian penalty against the Jacobian itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.problems import PROBLEMS, Problem, flat, generator, tanh_problem
from zoo.implicit import DEQ, jacobian_penalty

COPIES = 40_000


def copies(problem: Problem) -> tuple[Any, tuple[Any, ...], Tensor]:
    """The problem's first sample so often that a mean over them is an expectation, and its dense Jacobian (N, N)."""
    with torch.no_grad():
        z, _ = DEQ(problem.cell)(*problem.inputs)

    def repeat(t: Tensor) -> Tensor:
        return t.detach()[:1].expand(COPIES, *t.shape[1:])

    one = problem._replace(
        z0=pytree.tree_map(lambda t: t[:1], z), inputs=pytree.tree_map(lambda t: t[:1], problem.inputs)
    )
    J = torch.autograd.functional.jacobian(one._flat_cell, flat(one.z0), create_graph=True)[0, :, 0]
    return pytree.tree_map(repeat, z), pytree.tree_map(repeat, problem.inputs), J


@pytest.mark.parametrize("problem", PROBLEMS)
def test_unbiased_for_the_squared_frobenius_norm_over_n(problem: str) -> None:
    p = PROBLEMS[problem]()
    z, inputs, J = copies(p)
    estimates = jacobian_penalty(p.cell, z, *inputs)
    expected = (J.square().sum() / J.shape[0]).detach()
    assert estimates.shape == (COPIES,)
    standard_error = estimates.detach().std() / COPIES**0.5
    assert standard_error < 0.02 * expected
    assert (estimates.mean() - expected).abs() < 4 * standard_error


def test_more_probes_have_less_variance_and_the_same_mean() -> None:
    p = tanh_problem()
    z, inputs, _ = copies(p)
    one, eight = (jacobian_penalty(p.cell, z, *inputs, probes=n).detach() for n in (1, 8))
    assert 6 < one.var() / eight.var() < 10
    assert (one.mean() - eight.mean()).abs() < 0.03 * one.mean()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_its_gradient_is_that_of_the_norm(problem: str) -> None:
    """With respect to parameters, on average; the state gets none."""
    p = PROBLEMS[problem]()
    z, inputs, J = copies(p)
    z = pytree.tree_map(lambda t: t.clone().requires_grad_(), z)
    parameters = list(p.cell.parameters())
    exact = torch.autograd.grad(J.square().sum() / J.shape[0], parameters, materialize_grads=True)
    penalty = jacobian_penalty(p.cell, z, *inputs).mean()
    found = torch.autograd.grad(penalty, parameters, retain_graph=True, materialize_grads=True)
    scale = max(float(e.norm()) for e in exact)
    for ours, expected in zip(found, exact, strict=True):
        assert (ours - expected).norm() < 0.05 * scale
    assert scale > 0
    states = pytree.tree_leaves(z)
    assert all(g is None for g in torch.autograd.grad(penalty, states, allow_unused=True))


def test_inputs_get_a_gradient() -> None:
    p = tanh_problem()
    z, _ = DEQ(p.cell)(*p.inputs)
    (gradient,) = torch.autograd.grad(jacobian_penalty(p.cell, z, *p.inputs).sum(), p.inputs)
    assert gradient.abs().max() > 0


def test_each_sample_has_its_own() -> None:
    gain = torch.tensor([[0.0], [1.0], [3.0]])
    z = torch.randn(3, 200, generator=generator(0))
    estimates = jacobian_penalty(lambda z, gain: gain * z, z, gain)
    torch.testing.assert_close(estimates, gain.squeeze(1).square(), rtol=0.4, atol=0)
    assert estimates[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    z = torch.randn(3, 100, generator=generator(0)).to(dtype)
    estimates = jacobian_penalty(lambda z: 0.5 * z, z)
    assert estimates.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(estimates.float(), torch.full((3,), 0.25), rtol=0.5, atol=0)


def test_an_empty_batch() -> None:
    p = tanh_problem(batch=0)
    penalty = jacobian_penalty(p.cell, p.z0, *p.inputs)
    assert penalty.shape == (0,)
    penalty.sum().backward()
    assert not p.cell.W.grad.any()


def test_without_gradients_it_is_a_number_and_keeps_no_graph() -> None:
    p = tanh_problem()
    with torch.no_grad():
        penalty = jacobian_penalty(p.cell, p.z0, *p.inputs)
    assert not penalty.requires_grad
    assert (penalty > 0).all()


def test_in_autocast_parameters_get_gradients() -> None:
    p = tanh_problem()
    cell, x = p.cell.float(), p.inputs[0].detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            cell(torch.zeros(3, 4), x)
        penalty = jacobian_penalty(cell, torch.zeros(3, 4), x).mean()
    assert penalty.dtype == torch.float32
    (gradient,) = torch.autograd.grad(penalty, cell.W)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("probes", [0, -1])
def test_at_least_one_probe(probes: int) -> None:
    with pytest.raises(ValueError, match=rf"jacobian_penalty\(probes=...\) takes an integer >= 1; given: {probes}"):
        jacobian_penalty(lambda z: z, torch.zeros(1, 1), probes=probes)

"""Regularisers of the equilibrium."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .compiled import eagerly
from .maps import FlatMap
from .solvers.base import is_count
from .state import State, StateView


def jacobian_penalty(f: Callable[..., State], z: State, *inputs: State, probes: int = 1) -> Tensor:
    """An unbiased estimate of ||df/dz||_F^2 / N for each sample, differentiable with respect to inputs and parameters.

    Hutchinson's estimator, E ||v^T J||^2 with v ~ N(0, I): Bai, Koltun and Kolter, "Stabilizing Equilibrium Models by
    Jacobian Regularization" (ICML 2021), equation 8. Add a multiple of its mean to the loss.

    Args:
        f: the cell.
        z: where the Jacobian is taken, usually z*; any pytree state. No gradient flows to it.
        inputs: further arguments of f.
        probes: random vectors a sample; the variance falls as 1 / probes.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: ``probes`` is not an integer >= 1.
        RuntimeError: in ``torch.inference_mode``.
    """
    if not is_count(probes, at_least=1):
        raise ValueError(f"jacobian_penalty(probes=...) takes an integer >= 1; given: {probes!r}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "jacobian_penalty differentiates, which torch.inference_mode forbids; use torch.no_grad there"
        )
    z = pytree.tree_map(torch.Tensor.detach, z)
    view = StateView(z)
    with torch.enable_grad(), eagerly():
        z_in = view.flatten(z).requires_grad_()
        fz = FlatMap(f, view, inputs)(z_in)
        total = z_in.new_zeros(view.batch)
        for _ in range(probes):
            (product,) = torch.autograd.grad(fz, z_in, torch.randn_like(fz), create_graph=True, allow_unused=True)
            if product is not None:  # f does not depend on z: J = 0
                total = total + product.square().sum(dim=1)
    return total / (probes * view.size)

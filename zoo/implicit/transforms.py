"""Equilibria under the transforms of ``torch.func``: what works, and what is refused with the reason.

``torch.func.grad`` (and ``grad_and_value``, also over ``functional_call``) works. Torch has no public way to ask which
transforms are active, so the private one is used, here only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .state import State

_functorch = torch._C._functorch  # noqa: SLF001


def refuse_transforms(*states: State, unrolled: bool) -> None:
    """Raise where a derivative would fail later, or be wrong.

    Raises:
        NotImplementedError: under vmap; or, unless ``unrolled``, in forward mode or a nested grad.
    """
    kinds = [entry.key() for entry in _functorch.get_interpreter_stack() or ()]
    if _functorch.TransformType.Vmap in kinds:
        raise NotImplementedError(
            "torch.func.vmap (or jacrev, jacfwd or hessian) over a solve: each sample stops by itself, which vmap "
            "cannot follow. Rows of a batch are solved independently anyway: make the mapped dimension part of the batch. "
            "For Jacobians and Hessians use torch.autograd.functional"
        )
    if unrolled:
        return
    leaves = (x for x in pytree.tree_leaves(states) if isinstance(x, Tensor))
    if _functorch.TransformType.Jvp in kinds or any(forward_ad.unpack_dual(x).tangent is not None for x in leaves):
        raise NotImplementedError(
            "forward-mode derivatives of an equilibrium exist with UnrolledGradient() only; "
            "an input is a dual tensor (torch.autograd.forward_ad, torch.func.jvp)"
        )
    if kinds.count(_functorch.TransformType.Grad) > 1:
        raise NotImplementedError(
            "nested torch.func.grad of an equilibrium: use torch.autograd.grad(create_graph=True), which it supports "
            "to any order, or UnrolledGradient()"
        )


def current_transform() -> tuple[int, object] | None:
    """The innermost transform that is active; None outside of all."""
    top = _functorch.peek_interpreter_stack()
    return None if top is None else (top.level(), top.key())


def check_transform(before: tuple[int, object] | None) -> None:
    """Raise unless the backward pass runs within the transform in which the equilibrium was computed.

    Raises:
        NotImplementedError: it runs after it, as that of ``torch.func.vjp`` does.
    """
    if before is not None and current_transform() != before:
        raise NotImplementedError(
            "of the transforms of torch.func, an equilibrium supports torch.func.grad (and grad_and_value), once; for "
            "vjp, jacrev, hessian and nested grads use torch.autograd.grad(create_graph=True) or "
            "torch.autograd.functional, which it supports to any order, or UnrolledGradient()"
        )


def new_leaf(w: Tensor) -> Tensor:
    """``w`` as a leaf that requires a gradient, which nobody reads."""
    with enable_inplace_requires_grad(True):  # noqa: FBT003 - without it torch.func.grad refuses
        leaf = w.detach().requires_grad_()
    if current_transform() is None:  # a backward pass may reach it
        leaf.register_post_accumulate_grad_hook(_drop_grad)
    return leaf


def _drop_grad(leaf: Tensor) -> None:
    leaf.grad = None

"""Equilibria under the transforms of ``torch.func``: what works, and what is refused with the reason.

``torch.func.grad`` (and ``grad_and_value``, also over ``functional_call``) works. Torch has no public way to ask which
transforms are active, so the private one is used, here only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .state import State

_functorch = torch._C._functorch  # noqa: SLF001

_FORWARD_MODE = (
    "forward-mode derivatives of an equilibrium exist with UnrolledGradient() only; an input, or what f holds, is a "
    "dual tensor (torch.autograd.forward_ad, torch.func.jvp)"
)


def refuse_transforms(*states: State, unrolled: bool) -> None:
    """Raise where a derivative would fail later, or be wrong.

    Raises:
        NotImplementedError: under vmap; or, unless ``unrolled``, in forward mode or a nested grad.
    """
    kinds = [entry.key() for entry in _functorch.get_interpreter_stack() or ()]
    if _functorch.TransformType.Vmap in kinds:
        raise NotImplementedError(
            "torch.func.vmap (or jacrev, jacfwd or hessian) over a solve: each sample stops by itself, which vmap "
            "cannot follow. Rows of a batch are solved independently anyway: make the mapped dimension part of the "
            "batch. For Jacobians and Hessians use torch.autograd.functional"
        )
    if unrolled:
        return
    if _functorch.TransformType.Jvp in kinds:
        raise NotImplementedError(_FORWARD_MODE)
    refuse_dual(states)
    if kinds.count(_functorch.TransformType.Grad) > 1:
        raise NotImplementedError(
            "nested torch.func.grad of an equilibrium: use torch.autograd.grad(create_graph=True), which it supports "
            "to any order, or UnrolledGradient()"
        )


def in_dual_level() -> bool:
    """Whether there may be dual tensors."""
    return bool(forward_ad._current_level >= 0)  # noqa: SLF001


def refuse_dual(states: State) -> None:
    """Raise for dual tensors.

    Raises:
        NotImplementedError: there is one among ``states``.
    """
    if not in_dual_level():
        return
    leaves = (x for x in pytree.tree_leaves(states) if isinstance(x, Tensor))
    if any(forward_ad.unpack_dual(x).tangent is not None for x in leaves):
        raise NotImplementedError(_FORWARD_MODE)


@contextmanager
def batched_cotangents_explained() -> Iterator[None]:
    """What torch says about several cotangents at once, in terms of the remedy."""
    try:
        yield
    except RuntimeError as error:
        if "Batching rule" not in str(error):
            raise
        raise NotImplementedError(
            "the adjoint of an equilibrium takes one cotangent a solve: torch.autograd.grad(is_grads_batched=False), "
            "torch.autograd.functional.jacobian(vectorize=False); or NeumannGradient(), which takes several"
        ) from error


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


def unwrapped(x: Tensor) -> Tensor:
    """``x`` as it was before the transforms, whose wrappers can be neither copied nor pickled."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def new_leaf(w: Tensor) -> Tensor:
    """``w`` as a leaf that requires a gradient, which nobody reads."""
    with enable_inplace_requires_grad(True):  # noqa: FBT003 - without it torch.func.grad refuses
        leaf = w.detach().requires_grad_()
    if current_transform() is None:  # a backward pass may reach it
        leaf.register_post_accumulate_grad_hook(_drop_grad)
    return leaf


def _drop_grad(leaf: Tensor) -> None:
    leaf.grad = None

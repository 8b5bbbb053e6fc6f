"""The implicit function theorem as autograd sees it: w = F(w, theta) gives dw = (I - dF/dw)^-1 dF/dtheta dtheta."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compiled import eagerly, say_that_buffers_are_kept
from .maps import AdjointMap, full_precision
from .transforms import batched_cotangents_explained, check_transform, current_transform, new_leaf

SolveAdjoint = Callable[[AdjointMap], Tensor]
"""u with u = J^T u + g for a map whose ``offset`` is g, from u = g."""

Replace = Callable[[Tensor], Tensor]
"""What stands in for a tensor that a map depends on."""

Implicit = Callable[[Tensor, Replace], Tensor]
"""w -> F(w) on ``(B, N)`` matrices, with other tensors in place of those that it depends on and that are not leaves."""


def attach_implicit(
    F: Implicit,
    w: Tensor,
    visible: Sequence[Tensor],
    J: Tensor | None,
    solve_adjoint: SolveAdjoint,
    *,
    unit: bool = True,
) -> Tensor:
    """The fixed point ``w`` of ``F`` with its implicit gradient, of any order.

    First derivatives read the graph of one evaluation of F, whatever it depends on. Where a graph of the backward pass
    is asked for (``create_graph=True``), F is evaluated once more at the attached w, so that what the backward pass
    computes depends on w too; and u, the solution of the adjoint equation, is the fixed point of u -> J^T u + g, which
    is attached in the same way. That needs to know what F depends on: where F depends on more than ``visible``, the
    second derivative raises.

    Args:
        F: the map.
        w: ``(B, N)``, with w = F(w).
        visible: tensors that require a gradient and that F may depend on.
        J: ``(B, N, N)`` dF/dw at w, if ``solve_adjoint`` wants it.
        solve_adjoint: solves for u; called with grad mode off.
        unit: give it a g whose entries are at most 1 in size; u is linear in g, and squares of a tiny g underflow.

    Returns:
        ``(B, N)``, the values of ``w``; ``w`` itself if F depends on nothing that requires a gradient.
    """
    with torch.enable_grad():
        w_in = new_leaf(w)
        gates = _Gates(visible)
        fw = F(w_in, gates)
    transform = current_transform()
    depends = _dependence(fw, w_in, visible, gates)
    if not (depends.used or depends.hidden):
        return w

    def solve_for(fw: Tensor, w: Tensor, g: Tensor) -> Tensor:
        with torch.no_grad(), full_precision(g.device), batched_cotangents_explained():
            # A g that is not finite (a scaled loss overflowed) goes on as it is, and is no failure of the solve.
            peak = g.abs().amax(dim=1, keepdim=True) if g.numel() else g[:, :1]
            finite = peak.isfinite()
            size = peak.clamp_min(torch.finfo(g.dtype).tiny) if unit else torch.ones_like(peak)
            u = solve_adjoint(AdjointMap(w, fw, torch.where(finite, g / size, 0), J)) * size
            return torch.where(finite, u, torch.nan)

    def first(g: Tensor) -> Tensor:
        check_transform(transform)
        u = solve_for(fw, w_in, g)
        return _RefuseSecondDerivative.apply(u, fw, g) if torch.is_grad_enabled() else u

    def again(w: Tensor, g: Tensor) -> Sequence[Tensor | None]:
        check_transform(transform)
        gates = _Gates([w, *depends.used])
        with torch.enable_grad(), eagerly():
            fw_again = F(gates(w), gates)
        _check_same(fw, fw_again)
        if _dependence(fw_again, w, depends.used, gates).differs_from(depends):
            raise RuntimeError(
                "the second derivative of an equilibrium evaluates f again in the backward pass, and f depended on "
                "other tensors than before: its parameters were replaced in between (as torch.func.functional_call "
                "does when it returns). Pass them to f as inputs, and call functional_call in f"
            )

        def adjoint(u: Tensor, replace: Replace) -> Tensor:  # u -> J^T u + g, with a graph
            w_here = replace(w)
            with eagerly():
                Fw = F(w_here, replace)
            (product,) = torch.autograd.grad(Fw, w_here, u, create_graph=True, allow_unused=True)
            return replace(g) if product is None else product + replace(g)

        u = solve_for(fw_again, gates(w), g)
        of_adjoint = [w, *((g,) if g.requires_grad else ()), *depends.used]
        u = attach_implicit(adjoint, u, of_adjoint, None if J is None else J.mT, solve_adjoint, unit=unit)
        with gates.closed():  # partial derivatives: w, and what an input depends on, stay as they are
            held = [gates(x) for x in depends.used]
            return torch.autograd.grad(fw_again, held, u, create_graph=True, allow_unused=True)

    if depends.hidden:
        attached: Tensor = _Attach.apply(fw, w, first, None)
    else:
        attached = _Attach.apply(fw, w, first, again, *depends.used)
    return attached


def attach_straight_through(fw: Tensor, w: Tensor) -> Tensor:
    """The values of ``w`` with the graph of ``fw``."""
    attached: Tensor = _Attach.apply(fw, w, None, None)
    return attached


class _Attach(torch.autograd.Function):
    """The value of ``w`` with the graph of ``fw``; gradients pass through ``first`` on their way, if there is one.

    With ``create_graph=True`` they go to ``visible`` instead, by ``again``.
    """

    @staticmethod
    def forward(
        fw: Tensor,
        w: Tensor,
        first: Callable[[Tensor], Tensor] | None,
        again: Callable[[Tensor, Tensor], Sequence[Tensor | None]] | None,
        *visible: Tensor,
    ) -> Tensor:
        return w.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.first, ctx.again, *visible = inputs
        ctx.count = len(visible)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None, None, None, None, *(None for _ in range(ctx.count)))
        if ctx.again is not None and torch.is_grad_enabled():
            (w,) = ctx.saved_tensors
            to_visible: Sequence[Tensor | None] = ctx.again(w, g)
            return (None, None, None, None, *to_visible)
        u: Tensor = g if ctx.first is None else ctx.first(g)
        return (u, None, None, None, *(None for _ in range(ctx.count)))


class _Gates:
    """Stand-ins for tensors; gradients pass through them to what they stand for, unless the gates are closed."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._all = _Passage()
        self._of = {id(x): _Gate.apply(x, self._all) for x in tensors if not x.is_leaf}

    def __call__(self, x: Tensor) -> Tensor:
        stand_in: Tensor = self._of.get(id(x), x)
        return stand_in

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._all.open = False
        try:
            yield
        finally:
            self._all.open = True


@dataclass
class _Passage:
    """What all gates of a kind share. They do not hold each other: graphs die by counting references."""

    open: bool = True


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, passage: _Passage) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.passage = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        return (g if ctx.passage.open else None), None


class _RefuseSecondDerivative(torch.autograd.Function):
    """u, which raises when it is differentiated: how it depends on w, F and g is not recorded.

    ``fw`` and ``g`` are there for their graphs: whoever differentiates with respect to anything behind them comes by.
    """

    @staticmethod
    def forward(u: Tensor, fw: Tensor, g: Tensor) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise NotImplementedError(
            "the second derivative of an equilibrium needs to see all that f depends on, and this f depends on a "
            "tensor that is neither one of its inputs nor a parameter of f as a module: pass it to f as an input, let "
            "f be the nn.Module that owns it, or use UnrolledGradient()"
        )


class _Dependence(NamedTuple):
    used: list[Tensor]  # what F was seen to depend on
    hidden: bool  # whether it depends on anything else

    def differs_from(self, other: _Dependence) -> bool:
        return {id(x) for x in self.used} != {id(x) for x in other.used} or self.hidden != other.hidden


def _dependence(output: Tensor, w: Tensor, visible: Sequence[Tensor], gates: _Gates) -> _Dependence:
    """What the graph of ``output`` ends in, besides ``w``.

    It reaches what is visible and not a leaf by its gate. Whoever comes by another way, as a closure does over what
    was computed from an input, is followed to the leaves.
    """
    if output.is_leaf:
        seen_directly = [x for x in visible if x is output]
        return _Dependence(seen_directly, output.requires_grad and output is not w and not seen_directly)
    leaves = {id(x): x for x in visible if x.is_leaf}
    inner = {(gates(x).grad_fn, gates(x).output_nr): x for x in (w, *visible) if not x.is_leaf}
    used: dict[int, Tensor] = {}
    hidden = False
    stack: list[tuple[Any, int]] = [(output.grad_fn, output.output_nr)]
    seen = set(stack)
    while stack:
        edge = stack.pop()
        if edge in inner:
            if inner[edge] is not w:
                used[id(inner[edge])] = inner[edge]
            continue
        node = edge[0]
        say_that_buffers_are_kept(node)
        variable = getattr(node, "variable", None)  # only AccumulateGrad nodes have one
        if variable is not None and variable is not w:
            if id(variable) in leaves:
                used[id(variable)] = variable
            else:
                hidden = True
        upstreams = node.next_functions
        if isinstance(node, _Attach._backward_cls) and getattr(node, "again", None):  # noqa: SLF001
            upstreams = upstreams[1:]  # an equilibrium within F: what its own fw depends on is listed after it
        for upstream in upstreams:
            if upstream[0] is not None and upstream not in seen:
                seen.add(upstream)
                stack.append(upstream)
    return _Dependence(list(used.values()), hidden)


def _check_same(fw: Tensor, again: Tensor) -> None:
    """Raise unless a second evaluation of F gave what the first one gave."""
    rtol = torch.finfo(fw.dtype).eps ** 0.5
    with torch.no_grad():
        change, size = torch.linalg.vector_norm(again - fw), torch.linalg.vector_norm(fw)
        if change > rtol * size:
            raise RuntimeError(
                "the second derivative of an equilibrium evaluates f again in the backward pass, and f returned "
                f"something else than before (relative change {float(change / size):.1e}): its weights or inputs were "
                "changed in between, or f is random. Differentiate before the weights are changed; use "
                "VariationalDropout for dropout"
            )

"""The maps that solvers iterate, as functions on ``(B, N)`` matrices: f itself, and the adjoint of f at z*."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from .compiled import eagerly
from .computed_weights import with_present_weights
from .dropout import current_draws, use_draws
from .state import State, StateView


@runtime_checkable
class HasJacobian(Protocol):
    """A map that knows its own Jacobian, for :class:`~zoo.implicit.Newton`."""

    def jacobian(self, z: State, *inputs: State) -> Tensor:
        """``(B, N, N)``: entry ``[b, i, j]`` = d f(z, x)_bi / d z_bj, in the order of the flattened state."""
        ...


_IN_PLACE = (
    "f changed its argument z in place, so its residual cannot be measured: let f return a new state "
    "(z + ..., not z += ...; torch.relu, not torch.relu_)"
)


def module_of(f: object) -> nn.Module | None:
    """The module that f is, or is a bound method of."""
    owner = getattr(f, "__self__", f)
    return owner if isinstance(owner, nn.Module) else None


class FlatMap:
    """f(z, *inputs) on ``(B, N)`` matrices, called in the autocast state in which this object was made.

    Args:
        f: the cell.
        view: what its states look like.
        inputs: its further arguments.
        recompute: keep no activation of recorded evaluations; they are computed again in the backward pass.
    """

    def __init__(
        self, f: Callable[..., State], view: StateView, inputs: tuple[State, ...], *, recompute: bool = False
    ) -> None:
        self.f = f
        self.view = view
        self.inputs = inputs
        self.recompute = recompute
        self.autocast_dtype = autocast_dtype(view.device)
        self.draws = current_draws()
        self.owner = module_of(f)
        self.parameters: dict[str, Tensor] = {}
        if self.owner is not None and torch.is_grad_enabled():
            self.parameters.update(self.owner.named_parameters())
        self._calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            inputs = [x for x in pytree.tree_leaves(self.inputs) if isinstance(x, Tensor)]
            evaluate = _refusing_changes(self._evaluate_again, [*inputs, *self.parameters.values()])
            evaluate = with_present_weights(evaluate)
            value: Tensor = checkpoint(evaluate, z, use_reentrant=False)
            return value
        return self._evaluate(z)

    def with_inputs(self, z: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
        """f(z) with other tensors in place of the inputs and of the parameters."""
        other = copy.copy(self)
        other.inputs = pytree.tree_map_only(Tensor, replace, self.inputs)
        other.parameters = {name: replace(p) for name, p in self.parameters.items()}
        return other(z) if self.recompute else other._evaluate_again(z)  # noqa: SLF001 - of its own class

    def _evaluate_again(self, z: Tensor) -> Tensor:
        """f(z) with the parameters of this object, which by now may not be those that f has.

        ``torch.func.functional_call`` takes its parameters away from a module before the backward pass.
        """
        if self.owner is None:
            return self._evaluate(z)
        present = dict(self.owner.named_parameters())
        others = {name: p for name, p in self.parameters.items() if present.get(name) is not p}
        with _reparametrize_module(self.owner, others, tie_weights=True) if others else nullcontext():
            return self._evaluate(z)

    def _evaluate(self, z: Tensor) -> Tensor:
        if self.draws is not current_draws():  # rows have left, or the backward pass evaluates again
            with use_draws(self.draws):
                return self._evaluate(z)
        version = None if z.is_inference() else z._version  # noqa: SLF001 - torch's own count of in-place changes
        # Inference tensors have no such count. A change may not show in the first call, where z is often 0.
        before = z.clone() if version is None and self._calls < 2 else None
        self._calls += 1
        with self._autocast():
            value = self.f(self.view.unflatten(z), *self.inputs)
        if before is not None and not torch.equal(before.nan_to_num(), z.nan_to_num()):
            raise RuntimeError(_IN_PLACE)
        if version is not None and z._version != version:  # noqa: SLF001
            raise RuntimeError(_IN_PLACE)
        return self.view.flatten(value, casts=self.autocast_dtype is not None)

    def jacobian(self, z: Tensor) -> Tensor:
        """``(B, N, N)``, from f's own ``jacobian`` if it has one, else by N vector-Jacobian products."""
        if isinstance(self.f, HasJacobian):
            with self._autocast():
                J = self.f.jacobian(self.view.unflatten(z), *self.inputs)
            expected = (self.view.batch, self.view.size, self.view.size)
            if tuple(J.shape) != expected:
                raise ValueError(
                    f"{type(self.f).__name__}.jacobian must return df/dz of shape (B, N, N) = {expected}; "
                    f"it returned shape {tuple(J.shape)}"
                )
            return J.to(z.dtype)
        # Samples are independent, so the sum over the batch has the rows of all Jacobians at once: (N, B, N).
        with eagerly():
            jacobian: Tensor = torch.func.jacrev(lambda z: self._evaluate(z).sum(0))(z)
        return jacobian.movedim(1, 0)

    def project(self, z: Tensor) -> Tensor:
        return self.view.round(z) if self.view.rounds else z

    def select(self, index: Tensor) -> FlatMap:
        """The map on the samples ``index``, with their rows of the inputs.

        Raises:
            ValueError: an input is not batch first.
        """

        def rows(x: Tensor) -> Tensor:
            if x.dim() == 0 or x.shape[0] != self.view.batch:
                raise ValueError(
                    f"compact=True takes rows out of the inputs of f, so all are batch first, here with "
                    f"{self.view.batch} rows; given: an input of shape {tuple(x.shape)}. What is not per sample "
                    "belongs into f"
                )
            return x.index_select(0, index)

        inputs = pytree.tree_map_only(Tensor, rows, self.inputs)
        selected = copy.copy(self)
        selected.view, selected.inputs = self.view.resized(index.numel()), inputs
        selected.draws = None if self.draws is None else self.draws.of_rows(index, self.view.batch)
        return selected

    def in_precision(self, dtype: torch.dtype | None) -> FlatMap:
        """The map under autocast to ``dtype``, or without autocast."""
        other = copy.copy(self)
        other.autocast_dtype = dtype
        return other

    def visible(self) -> list[Tensor]:
        """What f is seen to depend on, and requires a gradient: its inputs, and the parameters of a module."""
        tensors = (x for x in pytree.tree_leaves(self.inputs) if isinstance(x, Tensor))
        return [x for x in itertools.chain(tensors, self.parameters.values()) if x.requires_grad]

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.view.device.type, dtype=self.autocast_dtype)


class AdjointMap:
    """u -> J^T u + g, with J = df/dz at z*, on the graph of one evaluation ``fz`` = f(z).

    Its fixed point u = (I - J^T)^-1 g is what the implicit function theorem asks for. ``J`` is there for solvers that
    need it as a matrix: taken with the forward evaluation, since f may have other weights by the time of the backward.
    """

    def __init__(self, z: Tensor, fz: Tensor, g: Tensor, J: Tensor | None) -> None:
        self._z = z
        self._fz = fz
        self.offset = g
        self._J = J

    def __call__(self, u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(self._fz, self._z, u, retain_graph=True, allow_unused=True)
        return self.offset if product is None else product + self.offset

    def jacobian(self, u: Tensor) -> Tensor:
        if self._J is None:
            raise RuntimeError("a solver that asks for Jacobians says so: needs_jacobian = True in its class")
        return self._J.mT

    def project(self, u: Tensor) -> Tensor:
        return u

    def select(self, index: Tensor) -> AdjointMap:
        raise NotImplementedError("an adjoint solve reads one graph of all rows; its solver takes compact=False")


def _refusing_changes(evaluate: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """``evaluate``, which raises when ``tensors`` have been changed in place since now."""
    versions = [x._version for x in tensors if not x.is_inference()]  # noqa: SLF001 - torch's own count of changes

    def here(z: Tensor) -> Tensor:
        if [x._version for x in tensors if not x.is_inference()] != versions:  # noqa: SLF001
            raise RuntimeError(
                "recompute=True evaluates f again in the backward pass, and an input or a weight of f has been changed "
                "in place since the forward pass: do the backward pass first, or take recompute=False"
            )
        return evaluate(z)

    return here


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast would use on ``device`` here and now; None where autocast is off."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Solver arithmetic: autocast off, in a state of its own."""
    if autocast_dtype(device) is None:
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield

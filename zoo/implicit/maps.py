"""The maps that solvers iterate, as functions on ``(B, N)`` matrices: f itself, and the adjoint of f at z*."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

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


class FlatMap:
    """f(z, *inputs) on ``(B, N)`` matrices, called in the autocast state in which this object was made."""

    def __init__(self, f: Callable[..., State], view: StateView, inputs: tuple[State, ...]) -> None:
        self.f = f
        self.view = view
        self.inputs = inputs
        self._autocast_dtype = autocast_dtype(view.device)
        self._calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        version = None if z.is_inference() else z._version  # noqa: SLF001 - torch's own count of in-place changes
        # Inference tensors have no such count. A change may not show in the first call, where z is often 0.
        copy = z.clone() if version is None and self._calls < 2 else None
        self._calls += 1
        with self._autocast():
            value = self.f(self.view.unflatten(z), *self.inputs)
        if copy is not None and not torch.equal(copy.nan_to_num(), z.nan_to_num()):
            raise RuntimeError(_IN_PLACE)
        if version is not None and z._version != version:  # noqa: SLF001
            raise RuntimeError(_IN_PLACE)
        return self.view.flatten(value, casts=self._autocast_dtype is not None)

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
        jacobian: Tensor = torch.func.jacrev(lambda z: self(z).sum(0))(z)
        return jacobian.movedim(1, 0)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.view.device.type, dtype=self._autocast_dtype)


class AdjointMap:
    """u -> J^T u + g, with J = df/dz at z*, on the graph of one evaluation ``fz`` = f(z).

    Its fixed point u = (I - J^T)^-1 g is what the implicit function theorem asks for. ``J`` is there for solvers that
    need it as a matrix: taken with the forward evaluation, since f may have other weights by the time of the backward.
    """

    def __init__(self, z: Tensor, fz: Tensor, g: Tensor, J: Tensor | None) -> None:
        self._z = z
        self._fz = fz
        self._g = g
        self._J = J

    def __call__(self, u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(self._fz, self._z, u, retain_graph=True, allow_unused=True)
        return self._g if product is None else product + self._g

    def jacobian(self, u: Tensor) -> Tensor:
        if self._J is None:
            raise RuntimeError("a solver that asks for Jacobians says so: needs_jacobian = True in its class")
        return self._J.mT


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

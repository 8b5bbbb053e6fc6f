"""Variational dropout: masks that stay for a whole solve, and new ones for the next.

A cell with ordinary dropout is another function at each evaluation, and has no equilibrium. Here a mask is drawn when
a solve first asks for it and kept until that solve ends, as recurrent networks keep theirs over all time steps: Gal
and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks" (NeurIPS 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
_Key = tuple[int, float, Shape]  # the id of the module, p, and the shape of the mask


class Draws:
    """The masks of one solve, and which rows of the batch are in the present evaluation.

    A mask has a module, a p and a shape; in another dtype or on another device it is the same mask.

    Attributes:
        rows: ``(R,)`` int64, the rows of the whole batch that are being evaluated; None for all of them.
        batch: the size of the whole batch; None if that is not known, and then rows have no masks.
    """

    __slots__ = ("_kept", "_scaled", "_selected", "batch", "rows")

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.batch: int | None = None
        self._kept: dict[_Key, Tensor] = {}
        self._scaled: dict[tuple[_Key, torch.dtype, torch.device], Tensor] = {}
        self._selected: dict[tuple[_Key, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def of_rows(self, rows: Tensor | None, batch: int) -> Draws:
        """The same masks, as an evaluation sees them that has only ``rows`` of a batch of size ``batch``.

        Within an evaluation that has lost rows itself (a solve in a cell), ``rows`` counts in what that one has left.
        """
        view = Draws()
        view._kept, view._scaled = self._kept, self._scaled
        if self.rows is None:
            view.rows, view.batch = rows, batch
        elif batch != self.rows.shape[0]:  # of something else than the samples around it: no mask can be given
            view.rows = self.rows
        else:
            view.rows = self.rows if rows is None else self.rows.index_select(0, rows)
            view.batch = self.batch
        return view

    def mask(self, owner: int, p: float, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``shape``: zeros with probability p, and 1 / (1 - p) elsewhere."""
        if self.rows is None:
            return self._whole((owner, p, shape), dtype, device)
        count = self.rows.shape[0]
        key = (owner, p, shape)
        whole = key if self.batch is None else (owner, p, (self.batch, *shape[1:]))
        if shape[0] == 1 and (count > 1 or (key in self._kept and whole not in self._kept)):
            return self._whole(key, dtype, device)  # not of samples: what they all share
        if shape[0] != count or self.batch is None:
            raise ValueError(
                f"a variational dropout has a tensor with {shape[0]} rows where {count} samples of a larger batch are "
                "evaluated (the others have converged and left), so its mask is not known: let dimension 0 be that of "
                "the samples, or of size 1, or keep all samples (compact=False)"
            )
        cached = self._selected.get((whole, dtype, device))
        if cached is None or cached[0] is not self.rows:
            rows, mask = self.rows, self._whole(whole, dtype, device)
            cached = (rows, _plain(lambda: mask.index_select(0, rows.to(device))))
            self._selected[whole, dtype, device] = cached
        return cached[1]

    def _whole(self, key: _Key, dtype: torch.dtype, device: torch.device) -> Tensor:
        scaled = self._scaled.get((key, dtype, device))
        if scaled is None:
            _, p, shape = key
            kept = self._kept.get(key)
            if kept is None:
                kept = _plain(lambda: torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - p))
                self._kept[key] = kept
            scale = 1 / (1 - p) if p < 1 else 0
            scaled = self._scaled[key, dtype, device] = _plain(lambda: kept.to(device, dtype) * scale)
        return scaled


def _plain(make: Callable[[], Tensor]) -> Tensor:
    """A tensor that may meet a graph later and elsewhere, though inference mode or torch.func.grad is on here."""
    with torch.inference_mode(mode=False), torch.no_grad():
        tensor = make()
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 - torch has no public way
            tensor = torch._C._functorch.get_unwrapped(tensor)  # noqa: SLF001
    return tensor


_current: ContextVar[Draws | None] = ContextVar("zoo.implicit draws", default=None)


def current_draws() -> Draws | None:
    """The masks in use here; None outside :func:`one_draw`. Each thread and each asynchronous task has its own."""
    return _current.get()


_D = TypeVar("_D", bound=Draws | None)


class _Use(Generic[_D]):
    """Makes ``draws`` the current ones. Two changes of a context variable: this happens at each evaluation."""

    __slots__ = ("_before", "_draws")

    def __init__(self, draws: _D) -> None:
        self._draws = draws
        self._before: list[Draws | None] = []

    def __enter__(self) -> _D:
        self._before.append(_current.get())
        _current.set(self._draws)
        return self._draws

    def __exit__(self, *_: object) -> None:
        _current.set(self._before.pop())


def use_draws(draws: _D) -> AbstractContextManager[_D]:
    """Within this context masks are those of ``draws``, whatever is around it; with None, new ones at each call.

    It takes an evaluation back to its masks when the solve is over, as recomputed activations need:

        >>> checkpoint(f, z, use_reentrant=False, context_fn=lambda: (nullcontext(), use_draws(current_draws())))
    """
    return _Use(draws)


def one_draw() -> AbstractContextManager[Draws]:
    """Within this context every :class:`VariationalDropout` keeps the mask that it draws first.

    :func:`fixed_point` enters it around each solve. Enter it yourself to have the masks of a solve also outside of it.
    A context within another one joins it.

    Example:
        >>> with one_draw():
        ...     z, report = deq(x)
        ...     penalty = jacobian_penalty(deq.cell, z, x)
    """
    around = _current.get()
    return _Use(Draws() if around is None else around)


class VariationalDropout(nn.Module):
    """Dropout whose mask stays the same throughout a solve, y = m * x / (1 - p) with P(m = 0) = p.

    There is nothing to reset: the next solve has new masks. Outside of a solve and of :func:`one_draw` each call draws
    anew, as ``nn.Dropout`` does. Within one, each shape of x has its own mask, and a module that is called twice with
    one shape applies one mask twice; use two modules where that is not meant. In eval mode, and with p = 0, it
    returns x itself. Masks come from torch's global generator of the device.

    Args:
        p: the probability of a zero, in [0, 1].
        shared_dims: the dimensions over which one value of the mask is shared; all but dimension 0, the batch.

    Raises:
        ValueError: an argument is not as described; or, in a call, x lacks one of the shared dimensions.
        TypeError: x is not a floating tensor.

    Example:
        >>> VariationalDropout(0.1)                      # every entry by itself
        >>> VariationalDropout(0.25, shared_dims=(2, 3)) # whole channels of (B, C, H, W)
        >>> VariationalDropout(0.1, shared_dims=1)       # features of (B, T, C), the same ones at all positions
        >>> VariationalDropout(0.1, shared_dims=2)       # whole tokens of (B, T, C)
    """

    def __init__(self, p: float = 0.5, shared_dims: int | Sequence[int] = ()) -> None:
        super().__init__()
        if not (isinstance(p, int | float) and 0 <= p <= 1):
            raise ValueError(f"VariationalDropout(p=...) takes a probability in [0, 1]; given: {p!r}")
        self.p = float(p)
        self.shared_dims = (shared_dims,) if isinstance(shared_dims, int) else tuple(shared_dims)
        if 0 in self.shared_dims:
            raise ValueError(
                "VariationalDropout(shared_dims=...) takes dimensions other than 0, the batch, whose samples do not "
                f"depend on each other; given: {shared_dims!r}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *)`` -> ``(B, *)`` of the same dtype."""
        if not self.training or self.p == 0:
            return x
        if not x.is_floating_point():
            raise TypeError(f"VariationalDropout takes a floating tensor; given: {x.dtype}")
        shape = self._mask_shape(x)
        mask = _mask_for_compiler if torch.compiler.is_compiling() else _mask
        return x * mask(id(self), self.p, shape, x.dtype, x.device)

    def extra_repr(self) -> str:
        return f"p={self.p}" + (f", shared_dims={self.shared_dims}" if self.shared_dims else "")

    def _mask_shape(self, x: Tensor) -> Shape:
        if not x.dim():
            raise ValueError("VariationalDropout takes a tensor whose dimension 0 is the batch; given: a scalar")
        if not self.shared_dims:
            return x.shape
        shape = list(x.shape)
        for dim in self.shared_dims:
            if not -x.dim() < dim < x.dim():
                raise ValueError(
                    f"VariationalDropout(shared_dims={self.shared_dims}) needs a tensor that has these dimensions "
                    f"besides dimension 0, the batch; given: shape {tuple(x.shape)}"
                )
            shape[dim] = 1
        return tuple(shape)


def _mask(owner: int, p: float, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (_current.get() or Draws()).mask(owner, p, shape, dtype, device)


# To torch.compile the mask is the output of an operator that it does not look into: no graph break, and no new graph
# for new masks. The tag keeps it from being merged with, or recomputed as, another call.
@torch.library.custom_op(
    f"{__name__.replace('.', '_')}::mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _mask_for_compiler(owner: int, p: float, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return _mask(owner, p, tuple(shape), dtype, device).clone()  # compiled code may reuse the memory of what it reads


@_mask_for_compiler.register_fake
def _mask_like(owner: int, p: float, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:  # noqa: ARG001
    return torch.empty(tuple(shape), dtype=dtype, device=device)

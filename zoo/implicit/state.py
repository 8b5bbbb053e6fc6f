"""States as pytrees, seen by solvers as one matrix.

A state is any nested tuple, list or dict of real floating tensors that share batch dimension 0; the other
dimensions are free. Solvers work on one ``(B, N)`` tensor, N being the number of entries of one sample. For a
single contiguous (or channels-last) tensor that matrix is a view: nothing is copied.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

State = Any
"""A tensor, or a nested tuple, list or dict of tensors, batch first."""

_ONE_TENSOR = pytree.tree_structure(0)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class _Leaf:
    """Where one tensor of the state stands in the ``(B, N)`` matrix."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int
    channels_last: bool

    def flatten(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.movedim(1, -1)
        return x.reshape(self.shape[0], self.size)

    def unflatten(self, flat: Tensor) -> Tensor:
        if not self.channels_last:
            return flat.reshape(self.shape).to(self.dtype)
        batch, channels, *spatial = self.shape
        return flat.reshape(batch, *spatial, channels).movedim(-1, 1).to(self.dtype)


class StateView:
    """The ``(B, N)`` view of states that look like ``example``.

    Attributes:
        batch: B, the number of samples (may be 0).
        size: N, the number of entries of one sample, all tensors together.
        dtype: what solvers compute in: the widest dtype of the state, and at least float32.
        device: the device of all tensors.

    Raises:
        TypeError: if the example holds anything but real floating tensors, or nothing at all.
        ValueError: if tensors have no batch dimension, different batch sizes or different devices.
    """

    def __init__(self, example: State) -> None:
        self._spec = _ONE_TENSOR
        paths: Sequence[tuple[Any, Any]] = [((), example)]
        if not isinstance(example, Tensor):
            paths, self._spec = pytree.tree_flatten_with_path(example)
        if not paths:
            raise TypeError("the state holds no tensor; give a tensor, or a nested tuple, list or dict of tensors")
        self._leaves = tuple(_leaf(f"state{pytree.keystr(path)}", x) for path, x in paths)
        first: Tensor = paths[0][1]
        for leaf, (_, x) in zip(self._leaves, paths, strict=True):
            if x.shape[0] != first.shape[0]:
                raise ValueError(
                    "all tensors of a state share batch dimension 0, but "
                    f"{self._leaves[0].name} has shape {tuple(first.shape)} and {leaf.name} has shape {leaf.shape}"
                )
            if x.device != first.device:
                raise ValueError(
                    "all tensors of a state live on one device, but "
                    f"{self._leaves[0].name} is on {first.device} and {leaf.name} is on {x.device}"
                )
        self.device = first.device
        self.dtype = torch.float32
        for leaf in self._leaves:
            self.dtype = torch.promote_types(self.dtype, leaf.dtype)
        # A state whose own dtype is narrower than the solver's is rounded when f sees it.
        self.rounds = any(leaf.dtype != self.dtype for leaf in self._leaves)
        self._measure()

    def _measure(self) -> None:
        self.batch = self._leaves[0].shape[0]
        self.sizes = [leaf.size for leaf in self._leaves]
        self.size = sum(self.sizes)
        # One plain tensor is the common case, and has a path without pytrees.
        only = self._leaves[0]
        plain = len(self._leaves) == 1 and self._spec.is_leaf() and not only.channels_last and not self.rounds
        self._plain_shape = torch.Size(only.shape) if plain else None

    def resized(self, batch: int) -> StateView:
        """The view of states with another number of samples."""
        view = copy.copy(self)
        view._resize(batch)  # noqa: SLF001 - of its own class
        return view

    def _resize(self, batch: int) -> None:
        self._leaves = tuple(replace(leaf, shape=(batch, *leaf.shape[1:])) for leaf in self._leaves)
        self._measure()

    def flatten(self, state: State, *, casts: bool = False) -> Tensor:
        """One state as a ``(B, N)`` tensor of ``self.dtype``.

        Args:
            state: a pytree of the same structure and shapes as the example.
            casts: accept other floating dtypes than the example's (autocast makes them).

        Raises:
            TypeError: structure or dtype differ from the example's.
            ValueError: a shape differs from the example's.
        """
        shape = self._plain_shape
        if shape is not None and isinstance(state, Tensor) and state.shape == shape and state.dtype == self.dtype:
            return state if len(shape) == 2 else state.reshape(self.batch, self.size)
        found, spec = pytree.tree_flatten(state)
        if spec != self._spec:
            raise TypeError(
                "f must return a state of the structure that it was given, "
                f"but it was given {self._structure(self._spec)} and returned {self._structure(spec)}"
            )
        for leaf, x in zip(self._leaves, found, strict=True):
            _check(leaf, x, casts=casts)
        if len(found) == 1:
            return self._leaves[0].flatten(found[0]).to(self.dtype)
        return torch.cat([leaf.flatten(x).to(self.dtype) for leaf, x in zip(self._leaves, found, strict=True)], dim=1)

    def unflatten(self, flat: Tensor) -> State:
        """The state that a ``(B, N)`` tensor stands for, in the example's structure, shapes and dtypes."""
        if self._plain_shape is not None:
            return flat if len(self._plain_shape) == 2 else flat.reshape(self._plain_shape)
        if len(self._leaves) == 1:
            return pytree.tree_unflatten([self._leaves[0].unflatten(flat)], self._spec)
        starts = itertools.accumulate(self.sizes, initial=0)
        parts = [flat.narrow(1, start, size) for start, size in zip(starts, self.sizes, strict=False)]
        leaves = [leaf.unflatten(part) for leaf, part in zip(self._leaves, parts, strict=True)]
        return pytree.tree_unflatten(leaves, self._spec)

    def round(self, flat: Tensor) -> Tensor:
        """``flat`` as the state's own dtypes can hold it."""
        return self.flatten(self.unflatten(flat))

    @staticmethod
    def _structure(spec: pytree.TreeSpec) -> str:
        return str(pytree.tree_unflatten(["tensor"] * spec.num_leaves, spec)).replace("'tensor'", "tensor")


def _leaf(name: str, x: object) -> _Leaf:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; a state holds tensors only")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; a state holds real floating tensors, so convert it first")
    if x.dim() == 0:
        raise ValueError(f"{name} has no dimension; a state is batch first: give it shape (B, ...), here (1,)")
    layout = _CHANNELS_LAST.get(x.dim())
    channels_last = layout is not None and x.is_contiguous(memory_format=layout) and not x.is_contiguous()
    return _Leaf(name, tuple(x.shape), x.dtype, x.shape[1:].numel(), channels_last)


def _check(leaf: _Leaf, x: object, *, casts: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"f returned a {type(x).__name__} for {leaf.name}, where a tensor was expected")
    if tuple(x.shape) != leaf.shape:
        raise ValueError(
            f"f must keep the shape of the state: {leaf.name} has shape {leaf.shape}, f returned shape {tuple(x.shape)}"
        )
    if x.dtype != leaf.dtype and not (casts and x.is_floating_point()):
        raise TypeError(
            f"f must keep the dtype of the state: {leaf.name} has shape {leaf.shape} and dtype {leaf.dtype}, "
            f"f returned shape {tuple(x.shape)} and dtype {x.dtype}; "
            "start from a state of f's own dtype (z0), or cast inside f"
        )

"""Class indices, checked before cross-entropy takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo import InputError


def check_targets(
    name: str, target: Tensor, shape: tuple[int, ...], one: str, num_classes: int, ignore_index: int | None = None
) -> int:
    """Refuse targets that cross-entropy would refuse without saying which, on a GPU by ending the process.

    Args:
        name: what they are called, like ``"labels"``.
        target: int64, of the shape ``shape``.
        shape: see target.
        one: what has one of them, like ``"a pixel"``.
        num_classes: they are from 0 to below this.
        ignore_index: the one that may be out of this range, and does not count.

    Returns:
        how many count.

    Raises:
        InputError: another shape or dtype, or a target out of its range.
    """
    if target.shape != shape or target.dtype != torch.int64:
        raise InputError(
            f"{name} are int64, one {one}, here of shape {shape}; given: {target.dtype} of shape {tuple(target.shape)}"
        )
    if target.numel() == 0:
        return 0
    counts = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    low, high, counted = torch.stack((*target.where(counts, 0).aminmax(), counts.sum())).tolist()  # one transfer
    if low < 0 or high >= num_classes:
        also = f" (num_classes={num_classes})" if ignore_index is None else f", or ignore_index={ignore_index}"
        raise InputError(f"{name} are from 0 to {num_classes - 1}{also}; given: from {low} to {high}")
    return int(counted)

"""The cell of the DEQ transformer as it is usually written: the same function of the same weights, with more work.

At each evaluation the memory stands in front of the state and is projected with it, queries included, and so are the
vectors of all distances; scores, weights and sums of the attention are tensors of their own. So do the published code
(locuslab/deq) and TorchDEQ's own zoo write it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.attention import RelativeAttention, shifted, sinusoids
from zoo.transformer import TransformerCell

from .train_transformer import LanguageStep


class Unprojected(NamedTuple):
    """What attention reads besides the state: memory x ``(B, m, d)`` and its u, sinusoids ``(1, m + L, d)``."""

    x: Tensor
    u: Tensor
    sinusoids: Tensor


class SpelledOutAttention(nn.Module):
    """The function of a :class:`~zoo.transformer.RelativeAttention`, whose weights it has. Without dropout."""

    def __init__(self, attention: RelativeAttention) -> None:
        super().__init__()
        self.of = attention

    def forward(self, x: Tensor, u: Tensor, past: Unprojected) -> Tensor:
        L, heads = x.shape[1], self.of.heads
        qkv = self.of.qkv(torch.cat([past.x, x], dim=1)) + torch.cat([past.u, u], dim=1)
        q, k, v = qkv.unflatten(2, (3, *heads)).unbind(2)
        q = q[:, -L:]
        r = self.of.position(past.sinusoids[0]).unflatten(1, heads)
        by_content = torch.einsum("bihd,bjhd->bhij", q + self.of.content_bias, k)
        by_distance = shifted(torch.einsum("bihd,jhd->bhij", q + self.of.position_bias, r))
        scores = (by_content + by_distance) / heads[1] ** 0.5
        a = scores.masked_fill(self._hidden(L, k.shape[1], x.device), -torch.inf).softmax(dim=3)
        sums = torch.einsum("bhij,bjhd->bihd", a, v)
        out: Tensor = self.of.output(self.of.before_output(sums.flatten(2)))
        return out

    def _hidden(self, L: int, K: int, device: torch.device) -> Tensor:
        positions = torch.arange(K, device=device)
        distance = positions[K - L :].unsqueeze(1) - positions
        return (distance < 0) | (distance >= self.of.span)


class SpelledOutCell(nn.Module):
    """f(z, u, z of the memory, u of the memory), with the weights of a :class:`~zoo.transformer.TransformerCell`."""

    def __init__(self, cell: TransformerCell) -> None:
        super().__init__()
        parameters = {id(p): p for p in cell.parameters()}
        self.cell = copy.deepcopy(cell, parameters)  # another cell of the same parameters
        for block in self.cell.blocks:
            block.attention = SpelledOutAttention(block.attention)  # type: ignore[arg-type]

    def forward(self, z: Tensor, u: Tensor, z_before: Tensor, u_before: Tensor) -> Tensor:
        distances = sinusoids(z_before.shape[1] + z.shape[1], z.shape[2], z)
        for block in self.cell.blocks:
            z = block(z, u, Unprojected(block.read(z_before), u_before, distances))  # type: ignore[operator]
        return z

    def initial_state(self, u: Tensor, z_before: Tensor, u_before: Tensor) -> Tensor:
        return z_before.new_zeros(*u.shape[:2], z_before.shape[2])


@dataclass(frozen=True)
class SpelledOutStep(LanguageStep):
    """The same training step with this cell."""

    @property
    def cell(self) -> SpelledOutCell:
        return self._cell

    @cached_property
    def _cell(self) -> SpelledOutCell:
        return SpelledOutCell(self.model.cell)

    def inputs(self) -> tuple[Any, ...]:
        return self.injection(), self.memory.z, self.memory.u

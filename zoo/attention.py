"""Attention to a text's own past, by content and by distance.

Dai et al., "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context" (ACL 2019), section 3.3.

Letters: B texts, L positions of a segment, m positions of the memory before it, d the width, H heads of width D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .implicit import VariationalDropout


class Past(NamedTuple):
    """What attention needs besides the state, which no evaluation changes.

    Keys and values of the memory, ``(B, m, H, D)``, and vectors r of the distances m + L - 1, ..., 0, for each text the
    same, ``(B, m + L, H, D)``.
    """

    k: Tensor
    v: Tensor
    r: Tensor


class RelativeAttention(nn.Module):
    """Attention to a text's own past by content and by distance (Dai et al., section 3.3).

    With [q, k, v] = W_qkv x + u, where k and v have those of the memory in front: a_ij = softmax_j ([(q_i + b_w) . k_j
    + (q_i + b_r) . r_(i-j)] / sqrt(D)), over the j not after i, and the output is W_o sum_j a_ij v_j.

    Args:
        d_model: d.
        num_heads, d_head: H and D.
        span: positions that one attends to, itself included.
        dropout: the probability with which a feature of the output is dropped, at all positions, for the whole solve.
        attention_dropout: that of a single a_ij.

    Attributes:
        before_output: a layer between the sum and W_o; none unless it is set.

    Shape:
        x ``(B, L, d)``, u ``(B, L, 3 H D)`` -> ``(B, L, d)``.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_head: int,
        span: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        width = num_heads * d_head
        self.heads = (num_heads, d_head)
        self.span = span
        self.qkv = nn.Linear(d_model, 3 * width, bias=False)
        self.position = nn.Linear(d_model, width, bias=False)
        self.content_bias = nn.Parameter(torch.empty(num_heads, d_head).normal_(std=0.01))
        self.position_bias = nn.Parameter(torch.empty(num_heads, d_head).normal_(std=0.01))
        self.before_output: nn.Module = nn.Identity()
        self.output = nn.Linear(width, d_model)
        self.dropout = VariationalDropout(dropout, shared_dims=1)
        self.attention_dropout = VariationalDropout(attention_dropout)

    @torch.no_grad()
    def begin_locally(self) -> None:
        """Set b_r such that attention falls off with distance at first, in the last heads faster than in the first.

        b_r = c W_r s(0), with s(0) the sinusoids of distance 0 and c from 3 to 12: W_r s(0) is like itself most, and
        W_r s(t) less with growing t.
        """
        H, D = self.heads
        nearest = self.position(sinusoids(1, self.position.in_features, self.position.weight)).view(H, D)
        c = torch.linspace(3, 12, H, dtype=nearest.dtype, device=nearest.device)
        self.position_bias.copy_(c.unsqueeze(1) * nearest)

    def past(self, x: Tensor, u: Tensor | None, sinusoids: Tensor) -> Past:
        """Keys and values of a memory x ``(B, m, d)`` with its u, and r of sinusoids ``(1, m + L, d)``."""
        width = self.output.in_features
        kv = F.linear(x, self.qkv.weight[width:])
        if u is not None:
            kv = kv + u[..., width:]
        k, v = kv.unflatten(2, (2, *self.heads)).unbind(2)
        r = self.position(sinusoids).unflatten(2, self.heads)
        return Past(k, v, r.expand(x.shape[0], -1, -1, -1))

    def forward(self, x: Tensor, u: Tensor | None, past: Past) -> Tensor:
        qkv = self.qkv(x)
        if u is not None:
            qkv = qkv + u
        q, k, v = qkv.unflatten(2, (3, *self.heads)).unbind(2)
        k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in ((past.k, k), (past.v, v)))  # (B, H, m + L, D)
        scale = self.heads[1] ** -0.5
        r = past.r[:1].sum(0)  # all rows are equal, and there may be none
        by_distance = torch.einsum("bihd,jhd->bhij", (q + self.position_bias) * scale, r)
        bias = shifted(by_distance).masked_fill(self._hidden(by_distance), -torch.inf)
        query = (q + self.content_bias).transpose(1, 2)
        dropping = self.training and self.attention_dropout.p > 0
        if torch.is_grad_enabled() or dropping:
            a = (query @ k.transpose(2, 3) * scale + bias).softmax(dim=3)
            sums = self.attention_dropout(a) @ v
        else:  # fused: the same without keeping a; it has no second derivatives and draws masks of its own
            sums = F.scaled_dot_product_attention(query, k, v, attn_mask=bias.to(query.dtype), scale=scale)
        out: Tensor = self.dropout(self.output(self.before_output(sums.transpose(1, 2).flatten(2))))
        return out

    def _hidden(self, scores: Tensor) -> Tensor:
        """Which of ``(B, H, L, m + L)`` are not attended to: what comes later, and what is ``span`` or more before."""
        L, K = scores.shape[2:]
        here = torch.ones(L, K, dtype=torch.bool, device=scores.device)
        return here.triu(K - L + 1) | here.tril(K - L - self.span)


def shifted(by_distance: Tensor) -> Tensor:
    """From one column a distance to one column a position, ``(B, H, L, K)``: [i, j] -> [i, j + L - 1 - i].

    Entries with j + L - 1 - i >= K, which are of later positions, have values without meaning.
    """
    B, H, L, K = by_distance.shape
    return F.pad(by_distance, (1, 0)).view(B, H, K + 1, L)[:, :, 1:].reshape(B, H, L, K)


def sinusoids(length: int, d: int, like: Tensor) -> Tensor:
    """``(1, length, d)``: sines, then cosines, of the distances length - 1, ..., 0 times 10000^(-2i/d).

    The frequencies are rounded to float32, as the published ones are.
    """
    frequencies = 1 / 10000 ** (torch.arange(0, d, 2, dtype=torch.float32, device=like.device) / d)
    distances = torch.arange(length - 1, -1, -1, device=like.device, dtype=like.dtype)
    angles = torch.outer(distances, frequencies.to(like.dtype))
    return torch.cat([angles.sin(), angles.cos()], dim=1).unsqueeze(0)

"""From tokens to vectors and back: an embedding whose weights are the output layer's too, in clusters for words.

Grave et al., "Efficient softmax approximation for GPUs" (ICML 2017); Baevski and Auli, "Adaptive Input Representations
for Neural Language Modeling" (ICLR 2019); as in Dai et al., "Transformer-XL" (ACL 2019).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
"""The target of a position that does not count."""


class TiedVocabulary(nn.Module):
    """Embedding and output layer of a language model, with the same weights.

    Without ``cutoffs``: e = sqrt(d) E[token], and p = softmax(h E^T + b).

    With them there are clusters of tokens: cluster i has the tokens from ``edges[i]`` to ``edges[i + 1]``, vectors E_i
    of width d_i = d / div_val^i, and a projection P_i ``(d, d_i)``. Then e = sqrt(d) P_i E_i[token - edges[i]]. The
    output layer's P_i are those of the embedding but for that of cluster 0, Q: a softmax over the words of
    cluster 0 and one entry a further cluster, of h Q times [E_0, ``cluster_weight``]^T, and in each further cluster one
    over its words, of h P_i E_i^T + b_i. Cluster i is the entry -i of the first softmax, counted from its end: so do
    the published weights have them.

    Args:
        vocab_size: V, the number of tokens, from 0 to V - 1; frequent ones first where there are ``cutoffs``.
        d_model: d.
        cutoffs: where clusters 1, 2, ... begin, rising, between 1 and V - 1.
        div_val: see above.

    Attributes:
        edges: 0, the cutoffs, V.
    """

    def __init__(self, vocab_size: int, d_model: int, cutoffs: Sequence[int] = (), div_val: int = 4) -> None:
        super().__init__()
        self.d_model = d_model
        self.edges = (0, *cutoffs, vocab_size)
        clusters = range(len(self.edges) - 1)
        sizes = [last - first for first, last in itertools.pairwise(self.edges)]
        widths = [d_model // div_val**i for i in clusters]
        self.words = nn.ParameterList(torch.empty(n, d) for n, d in zip(sizes, widths, strict=True))
        self.biases = nn.ParameterList(torch.zeros(n) for n in sizes)
        self.projections = nn.ParameterList(torch.empty(d_model, d) for d in widths if cutoffs)
        if cutoffs:
            self.head_projection = nn.Parameter(torch.empty(d_model, d_model))
            self.cluster_weight = nn.Parameter(torch.empty(len(cutoffs), d_model))
            self.cluster_bias = nn.Parameter(torch.zeros(len(cutoffs)))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.01)

    def begin_at_unit_scale(self) -> None:
        """Draw words and projections such that e has entries of about 1."""
        for words in self.words:
            nn.init.normal_(words, std=self.d_model**-0.5)
        for projection in self.projections:
            nn.init.normal_(projection, std=projection.shape[1] ** -0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 ``(*)`` -> ``(*, d)``."""
        scale = math.sqrt(self.d_model)
        if not self.projections:
            return F.embedding(tokens, self.words[0]) * scale
        flat = tokens.flatten()
        pieces, places = [], []
        for i, (first, last) in enumerate(itertools.pairwise(self.edges)):
            rows = ((first <= flat) & (flat < last)).nonzero().squeeze(1)
            pieces.append(F.embedding(flat[rows] - first, self.words[i]) @ self.projections[i].T)
            places.append(rows)
        e = torch.cat(pieces).index_select(0, torch.cat(places).argsort())
        out: Tensor = (e * scale).unflatten(0, tokens.shape)
        return out

    def nll(self, h: Tensor, target: Tensor) -> Tensor:
        """-log p(target | h) in nats, 0 where the target is -100.

        Shape:
            h ``(*, d)``, target int64 ``(*)`` -> ``(*)``, at least float32.
        """
        counts = target != IGNORED
        flat_h, flat = h.flatten(0, -2), target.where(counts, 0).flatten()
        head = _log_softmax(self._head(flat_h))
        size = self.edges[1]
        log_p = head.gather(1, flat.clamp(max=size - 1).unsqueeze(1)).squeeze(1)
        for i, (first, last) in enumerate(itertools.pairwise(self.edges[1:]), start=1):
            rows = ((first <= flat) & (flat < last)).nonzero().squeeze(1)
            tail = _log_softmax(self._tail(flat_h[rows], i))
            inside = tail.gather(1, (flat[rows] - first).unsqueeze(1)).squeeze(1)
            log_p = log_p.index_copy(0, rows, head[rows, -i] + inside)
        values: Tensor = -log_p.unflatten(0, target.shape)
        return values.where(counts, 0)

    def log_probs(self, h: Tensor) -> Tensor:
        """Log p of all tokens: ``(*, d)`` -> ``(*, V)``, at least float32."""
        head = _log_softmax(self._head(h))
        tails = [head[..., -i].unsqueeze(-1) + _log_softmax(self._tail(h, i)) for i in range(1, len(self.edges) - 1)]
        return torch.cat([head[..., : self.edges[1]], *tails], dim=-1)

    def _head(self, h: Tensor) -> Tensor:
        if not self.projections:
            return F.linear(h, self.words[0], self.biases[0])
        weight = torch.cat([self.words[0], self.cluster_weight])
        bias = torch.cat([self.biases[0], self.cluster_bias])
        return F.linear(h @ self.head_projection, weight, bias)

    def _tail(self, h: Tensor, i: int) -> Tensor:
        return F.linear(h @ self.projections[i], self.words[i], self.biases[i])

    def extra_repr(self) -> str:
        return f"vocab_size={self.edges[-1]}, d_model={self.d_model}, cutoffs={self.edges[1:-1]}"


def _log_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, in at least float32 also where autocast made the logits narrower."""
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))

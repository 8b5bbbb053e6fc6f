"""Deep equilibrium transformers: a language model whose depth is an equilibrium, and which remembers.

Bai, Kolter and Koltun, "Deep Equilibrium Models" (NeurIPS 2019), with the attention of Dai et al., "Transformer-XL"
(ACL 2019); with Jacobian regularisation: Bai, Koltun and Kolter (ICML 2021). In MIT-licensed code of the same authors:
locuslab/deq (DEQ-Sequence) and locuslab/torchdeq, whose checkpoints ``zoo.load_original`` reads.

Letters: B texts, L positions of a segment, m positions of the memory before it, d the width, H heads of width D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Past, RelativeAttention, sinusoids
from .implicit import DEQ, GMRES, Anderson, Gradient, ImplicitGradient, Solver, VariationalDropout, normalize_weights
from .implicit.choices import nearest
from .language import TextModel
from .registry import register_model
from .vocabulary import TiedVocabulary


class Memory(NamedTuple):
    """What a model keeps of the segments before: equilibria ``(B, m, d)`` and injections ``(B, m, 3 H D)``."""

    z: Tensor
    u: Tensor


class FeedForward(nn.Module):
    """W_2 relu(W_1 x + b_1) + b_2 at each position.

    Args:
        d_model, d_inner: widths outside and inside.
        dropout: the probability with which a feature is dropped, inside and outside, at all positions, for the solve.

    Shape:
        ``(B, L, d)`` -> ``(B, L, d)``.
    """

    def __init__(self, d_model: int, d_inner: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(d_model, d_inner)
        self.outer = nn.Linear(d_inner, d_model)
        self.inner_dropout = VariationalDropout(dropout, shared_dims=1)
        self.outer_dropout = VariationalDropout(dropout, shared_dims=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer_dropout(self.outer(self.inner_dropout(self.inner(x).relu_())))
        return out


class Block(nn.Module, ABC):
    """Attention, then a feed-forward layer; a subclass says how they are added up, and where it normalises.

    Args:
        d_model, num_heads, d_head, span, dropout, attention_dropout: see :class:`RelativeAttention`.
        d_inner: see :class:`FeedForward`.

    Shape:
        z and the output y are ``(B, L, d)``, u is ``(B, L, 3 H D)``.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_head: int,
        d_inner: int,
        span: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.attention = RelativeAttention(d_model, num_heads, d_head, span, dropout, attention_dropout)
        self.feed_forward = FeedForward(d_model, d_inner, dropout)

    @abstractmethod
    def read(self, z: Tensor) -> Tensor:
        """What attention reads of a state."""

    @abstractmethod
    def forward(self, z: Tensor, u: Tensor | None, past: Past) -> Tensor: ...


class PostNorm(Block):
    """h = LN(z + attention(z)), y = LN(h + feed_forward(h)): the published block. LN has no parameters."""

    def read(self, z: Tensor) -> Tensor:
        return z

    def forward(self, z: Tensor, u: Tensor | None, past: Past) -> Tensor:
        h = layer_norm(z + self.attention(z, u, past))
        return layer_norm(h + self.feed_forward(h))


class PreNorm(Block):
    """n = LN(z + attention(LN(z))), y = n + feed_forward(n): the published variant. It adds to what is normalised."""

    def read(self, z: Tensor) -> Tensor:
        return layer_norm(z)

    def forward(self, z: Tensor, u: Tensor | None, past: Past) -> Tensor:
        n = layer_norm(z + self.attention(self.read(z), u, past))
        out: Tensor = n + self.feed_forward(n)
        return out


class SubNorm(Block):
    """h = z + attention(LN_1(z)), y = h + feed_forward(LN_3(h)), with LN_2 before W_o: TorchDEQ's block.

    LN_1, LN_2 and LN_3 have parameters. f(z + c) = f(z) + c for a c that is the same for all features of a position, so
    such a cell has no isolated equilibrium: use it with ``unrolled``, as its published training and evaluation do.
    """

    def __init__(self, d_model: int, num_heads: int, d_head: int, *args: Any) -> None:
        super().__init__(d_model, num_heads, d_head, *args)
        self.norm1 = nn.LayerNorm(d_model)
        self.attention.before_output = nn.LayerNorm(num_heads * d_head)
        self.norm3 = nn.LayerNorm(d_model)

    def read(self, z: Tensor) -> Tensor:
        x: Tensor = self.norm1(z)
        return x

    def forward(self, z: Tensor, u: Tensor | None, past: Past) -> Tensor:
        h = z + self.attention(self.read(z), u, past)
        y: Tensor = h + self.feed_forward(self.norm3(h))
        return y


def layer_norm(x: Tensor) -> Tensor:
    """LN(x) over the last dimension, without parameters."""
    return F.layer_norm(x, x.shape[-1:])


BLOCKS: dict[str, type[Block]] = {"post": PostNorm, "pre": PreNorm, "sub": SubNorm}
"""What the argument ``norm`` chooses among."""

STARTS = ("published", "local")


class TransformerCell(nn.Module):
    """f(z, u, past): one block, or several in a row, each of which reads the same u and remembers the same z.

    Args:
        blocks: f is one after the other.
        position_dropout: the probability with which a feature of the sinusoids is dropped.
        weight_norm: whether all linear layers are weight-normalised.

    Shape:
        z and the output are ``(B, L, d)``, u is ``(B, L, 3 H D)``, past has one entry a block.
    """

    def __init__(self, blocks: Sequence[Block], position_dropout: float = 0.0, weight_norm: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.position_dropout = VariationalDropout(position_dropout, shared_dims=1)
        if weight_norm:
            normalize_weights(self.blocks, "weight")

    def past(self, memory: Memory, length: int) -> tuple[Past, ...]:
        """What the blocks need of a memory before a segment of this length, computed once a solve."""
        m, d = memory.z.shape[1:]
        positions = self.position_dropout(sinusoids(m + length, d, memory.z))
        return tuple(block.attention.past(block.read(memory.z), memory.u, positions) for block in self._blocks())

    def forward(self, z: Tensor, u: Tensor, past: tuple[Past, ...]) -> Tensor:
        for block, its_past in zip(self.blocks, past, strict=True):
            z = block(z, u, its_past)
        return z

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def initial_state(self, u: Tensor, past: tuple[Past, ...]) -> Tensor:
        """z0 = 0, in the dtype of the weights also where autocast made u narrower."""
        B, L, _ = u.shape
        bias = self._blocks()[0].attention.output.bias
        return u.new_zeros(B, L, len(bias), dtype=bias.dtype)


class DEQTransformer(TextModel):
    """A language model: embedding -> injection u -> equilibrium z* = f(z*, u, memory) -> output layer.

    Args:
        vocab_size: V, the number of tokens.
        d_model: d.
        num_heads, d_head: H and D; D = d / H if not given.
        d_inner: width of the feed-forward layers.
        layers: blocks of the cell. Of several the memory has what the last one gives, for all of them.
        norm: where the blocks normalise: ``"post"`` (:class:`PostNorm`), ``"pre"`` or ``"sub"``, which needs
            ``unrolled``.
        memory_length: positions that are remembered; may be changed at any time.
        attention_span: positions that one attends to, itself included; further ones in the memory are not seen.
        cutoffs, div_val: see :class:`~zoo.vocabulary.TiedVocabulary`.
        start: of the weights outside the normalised layers: ``"published"``, all of them N(0, 0.01^2); or ``"local"``,
            with words and injections of unit scale and :meth:`~zoo.attention.RelativeAttention.begin_locally`, which a
            small model learns from several times faster.
        dropout: the probability of all variational dropouts but attention_dropout's.
        attention_dropout: see :class:`RelativeAttention`.
        weight_norm: whether the linear layers of the cell are weight-normalised.
        unrolled: apply the cell this many times instead of solving.
        recompute: see :func:`~zoo.implicit.fixed_point`; saves memory in training.
        solver, gradient: see :class:`~zoo.implicit.DEQ`; by default Anderson to a relative residual of 1e-3, from which
            texts leave as they converge, since one hard text would cost the whole batch, and GMRES for the adjoint.

    Shape:
        tokens int64 ``(B, L)`` -> h ``(B, L, d)`` and the :class:`Memory` of the last memory_length positions.

    Raises:
        ValueError: an argument is not as described.

    Attributes:
        deq: the equilibrium layer; ``deq.report`` tells of the last solve.

    Example:
        >>> h, memory = model(first_segment)
        >>> h, memory = model(second_segment, memory)
        >>> loss = model.nll(h, target).mean()
        >>> model.generate("def ", length=100)
    """

    def __init__(
        self,
        vocab_size: int = 256,
        d_model: int = 128,
        num_heads: int = 4,
        d_head: int | None = None,
        d_inner: int = 1024,
        layers: int = 1,
        norm: str = "post",
        memory_length: int = 128,
        attention_span: int = 1000,
        cutoffs: Sequence[int] = (),
        div_val: int = 4,
        start: str = "published",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        weight_norm: bool = True,
        unrolled: int | None = None,
        recompute: bool = False,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        if norm not in BLOCKS:
            raise ValueError(f"unknown norm {norm!r}.{nearest(norm, list(BLOCKS))}")
        check_start(start)
        if norm == "sub" and unrolled is None:
            raise ValueError(
                "norm='sub' takes unrolled=..., like 12: its cell has no isolated equilibrium that could be solved for"
            )
        d_head = check_sizes(
            type(self).__name__, d_model, num_heads, d_head, cutoffs, vocab_size,
            {"d_inner": d_inner, "layers": layers, "attention_span": attention_span, "div_val": div_val},
        )  # fmt: skip
        super().__init__()
        self.memory_length = memory_length
        self.vocabulary = TiedVocabulary(vocab_size, d_model, cutoffs, div_val)
        self.input_dropout = VariationalDropout(dropout, shared_dims=1)
        self.injection = nn.Linear(d_model, 3 * num_heads * d_head)
        nn.init.normal_(self.injection.weight, std=0.01 if start == "published" else d_model**-0.5)
        nn.init.zeros_(self.injection.bias)
        blocks = [
            BLOCKS[norm](d_model, num_heads, d_head, d_inner, attention_span, dropout, attention_dropout)
            for _ in range(layers)
        ]
        if start == "local":
            begin_locally(self.vocabulary, *blocks)
        self.deq = DEQ(
            TransformerCell(blocks, dropout, weight_norm),
            Anderson(tol=1e-3, max_steps=30, compact=True) if solver is None else solver,
            ImplicitGradient(GMRES(tol=1e-3, max_steps=30)) if gradient is None else gradient,
            unrolled=unrolled,
            recompute=recompute,
        )
        self.output_dropout = VariationalDropout(dropout, shared_dims=2)  # whole positions: so the published training

    def forward(self, tokens: Tensor, memory: Memory | None = None, z0: Tensor | None = None) -> tuple[Tensor, Memory]:
        """``(B, L)`` -> h ``(B, L, d)`` and the new memory, from which no gradient flows.

        Args:
            tokens: int64, the text that follows what the memory is of.
            memory: of the text before; None where the text begins.
            z0: where the solve starts, ``(B, L, d)``; at 0 if not given.

        Raises:
            InputError: tokens of another shape or dtype, or outside of the vocabulary; a memory of another batch.
        """
        self.check_tokens(tokens)
        u = self.injection(self.input_dropout(self.vocabulary.embed(tokens)))
        if memory is None:
            memory = Memory(u.new_zeros(u.shape[0], 0, self.vocabulary.d_model), u[:, :0])
        self.check_memory(memory, tokens, (self.vocabulary.d_model, u.shape[2]))
        memory = Memory(*memory)  # a plain tuple will do
        past = self.cell.past(memory, tokens.shape[1])
        z, _ = self.deq(u, past, z0=z0)
        new_memory = Memory(*(self.remembered(old, x) for old, x in zip(memory, (z, u), strict=True)))
        return self.output_dropout(z), new_memory

    @property
    def is_the_same_in_pieces(self) -> bool:
        """Where one block is solved. Unrolled, or of several blocks, memories have the last state for all of them."""
        return self.deq.unrolled is None and len(self.cell.blocks) == 1

    @property
    def cell(self) -> TransformerCell:
        return cast(TransformerCell, self.deq.cell)

    def read_on(self, tokens: Tensor, memory: Memory, places: Tensor | None) -> tuple[Tensor, Memory]:
        """:meth:`forward` from the equilibria of the memory at ``places``, and from 0 where a place is -1."""
        if places is None:
            return self.forward(tokens, memory)
        index = places.clamp(min=0).unsqueeze(2).expand(-1, -1, memory.z.shape[2])
        z0 = memory.z.gather(1, index) if memory.z.shape[1] else memory.z.new_zeros(index.shape)
        return self.forward(tokens, memory, z0.where(places.unsqueeze(2) >= 0, 0))

    def last_output(self, memory: Memory) -> Tensor | None:
        """z* at the last position of a memory, ``(B, 1, d)``; None where it is empty."""
        z = memory[0]  # of a plain tuple too
        return z[:, -1:] if z.shape[1] else None


def begin_locally(vocabulary: TiedVocabulary, *blocks: nn.Module) -> None:
    """Words of unit scale, and attention that falls off with distance: ``start="local"``."""
    vocabulary.begin_at_unit_scale()
    for block in blocks:
        cast(Block, block).attention.begin_locally()


def check_start(start: str) -> None:
    """Raise ValueError unless there is such a start."""
    if start not in STARTS:
        raise ValueError(f"unknown start {start!r}.{nearest(start, list(STARTS))}")


def check_sizes(
    model: str,
    d_model: int,
    num_heads: int,
    d_head: int | None,
    cutoffs: Sequence[int],
    vocab_size: int,
    others: dict[str, int],
) -> int:
    """D; raises ValueError where the sizes of a language model make no sense."""
    for name, value in {"vocab_size": vocab_size, "d_model": d_model, "num_heads": num_heads, **others}.items():
        if value < 1:
            raise ValueError(f"{model}({name}=...) takes an integer >= 1; given: {value!r}")
    if d_model % 2:
        raise ValueError(f"{model}(d_model=...) takes an even number: half of it are sines; given: {d_model!r}")
    if list(cutoffs) != sorted({*cutoffs}) or not all(0 < cutoff < vocab_size for cutoff in cutoffs):
        raise ValueError(
            f"{model}(cutoffs=...) takes rising integers between 1 and vocab_size - 1 = {vocab_size - 1}; given: "
            f"{cutoffs!r}"
        )
    narrowest = d_model // others["div_val"] ** len(cutoffs)
    if narrowest < 1:
        raise ValueError(
            f"{model}: the last of {len(cutoffs) + 1} clusters has vectors of width d_model / div_val^{len(cutoffs)}, "
            f"less than 1 for d_model={d_model} and div_val={others['div_val']}"
        )
    if d_head is None:
        if d_model % num_heads:
            raise ValueError(
                f"{model}: without d_head each head has d_model / num_heads features, which is no integer for "
                f"d_model={d_model} and num_heads={num_heads}"
            )
        return d_model // num_heads
    if d_head < 1:
        raise ValueError(f"{model}(d_head=...) takes an integer >= 1; given: {d_head!r}")
    return d_head


# ---------------------------------------------------------------------------------------------------- published sizes

WIKITEXT103 = {
    "vocab_size": 267_735, "cutoffs": (20_000, 40_000, 200_000), "d_model": 700, "num_heads": 10, "memory_length": 150,
    "dropout": 0.05,
}  # fmt: skip
MODELS: dict[str, dict[str, object]] = {
    "deq_transformer": {},
    "deq_transformer_nano": {"num_heads": 8, "memory_length": 64, "start": "local"},  # for bytes of text
    "deq_transformer_wt103": {**WIKITEXT103, "d_inner": 48_000},
    "deq_transformer_pre_wt103": {**WIKITEXT103, "d_inner": 48_000, "norm": "pre"},
    "deq_lm_wt103": {**WIKITEXT103, "d_inner": 14_800, "norm": "sub", "layers": 3, "unrolled": 12},
}
for _name, _preset in MODELS.items():
    register_model(_name, DEQTransformer, **_preset)

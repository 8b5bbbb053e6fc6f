"""A transformer of stacked layers, each with weights of its own: what an equilibrium transformer is measured against.

Dai et al., "Transformer-XL" (ACL 2019), with the normalisation before each layer (Xiong et al., "On Layer
Normalization in the Transformer Architecture", ICML 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .attention import Past, sinusoids
from .language import TextModel
from .registry import register_model
from .transformer import Block, begin_locally, check_sizes, check_start
from .vocabulary import TiedVocabulary

LayerMemory = tuple[Tensor, ...]
"""What each layer read of the segments before, and what the last one gave out: n + 1 of ``(B, m, d)``."""


class Layer(Block):
    """h = z + attention(LN_1(z)), y = h + feed_forward(LN_2(h)); see :class:`~zoo.transformer.Block`."""

    def __init__(self, d_model: int, num_heads: int, d_head: int, d_inner: int, span: int, dropout: float) -> None:
        super().__init__(d_model, num_heads, d_head, d_inner, span, dropout, attention_dropout=0.0)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def read(self, z: Tensor) -> Tensor:
        x: Tensor = self.norm1(z)
        return x

    def forward(self, z: Tensor, u: Tensor | None, past: Past) -> Tensor:
        h = z + self.attention(self.read(z), u, past)
        y: Tensor = h + self.feed_forward(self.norm2(h))
        return y


class StackedTransformer(TextModel):
    """Embedding -> n layers -> normalisation -> output layer, with the interface of :class:`~zoo.DEQTransformer`.

    Args:
        layers: n.
        vocab_size, d_model, num_heads, d_head, d_inner, memory_length, attention_span, cutoffs, div_val, start,
            dropout: see :class:`~zoo.DEQTransformer`.

    Shape:
        tokens int64 ``(B, L)`` -> h ``(B, L, d)`` and a :data:`LayerMemory`.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        d_model: int = 128,
        num_heads: int = 4,
        d_head: int | None = None,
        d_inner: int = 512,
        layers: int = 3,
        memory_length: int = 128,
        attention_span: int = 1000,
        cutoffs: Sequence[int] = (),
        div_val: int = 4,
        start: str = "published",
        dropout: float = 0.0,
    ) -> None:
        check_start(start)
        d_head = check_sizes(
            type(self).__name__, d_model, num_heads, d_head, cutoffs, vocab_size,
            {"d_inner": d_inner, "layers": layers, "attention_span": attention_span, "div_val": div_val},
        )  # fmt: skip
        super().__init__()
        self.memory_length = memory_length
        self.vocabulary = TiedVocabulary(vocab_size, d_model, cutoffs, div_val)
        self.input_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(d_model, num_heads, d_head, d_inner, attention_span, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d_model)
        if start == "local":
            begin_locally(self.vocabulary, *self.layers)

    def forward(self, tokens: Tensor, memory: LayerMemory | None = None) -> tuple[Tensor, LayerMemory]:
        """``(B, L)`` -> h ``(B, L, d)`` and the new memory, from which no gradient flows.

        Raises:
            InputError: tokens of another shape or dtype, or outside of the vocabulary; a memory of another batch.
        """
        self.check_tokens(tokens)
        z = self.input_dropout(self.vocabulary.embed(tokens))
        if memory is None:
            memory = (z[:, :0],) * (len(self.layers) + 1)
        self.check_memory(memory, tokens, (z.shape[2],) * (len(self.layers) + 1))
        positions = sinusoids(memory[0].shape[1] + z.shape[1], z.shape[2], z)
        read = []
        for layer, before in zip(self.layers, memory, strict=False):
            assert isinstance(layer, Layer)  # noqa: S101 - for the type checker
            read.append(z)
            z = layer(z, None, layer.attention.past(layer.read(before), None, positions))
        h: Tensor = self.norm(z)
        return h, tuple(self.remembered(old, x) for old, x in zip(memory, [*read, h], strict=True))

    def last_output(self, memory: LayerMemory) -> Tensor | None:
        """H at the last position of a memory, ``(B, 1, d)``; None where it is empty."""
        return memory[-1][:, -1:] if memory[-1].shape[1] else None


register_model("stacked_transformer", StackedTransformer)
register_model(
    "stacked_transformer_nano", StackedTransformer, num_heads=8, d_inner=448, layers=2, memory_length=64, start="local"
)

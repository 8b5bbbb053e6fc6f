"""A small language model, and a small text of eleven words, of which each has another number of bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.text import TextDataModule, TextSplits, Vocabulary
from lightning_modules import LanguageModel
from zoo.implicit import Anderson, ImplicitGradient

VOCAB = 11
SIZES = {"d_model": 8, "num_heads": 2, "d_inner": 12, "memory_length": 6}
EXACT = Anderson(tol=1e-5, max_steps=60)


class Words(Vocabulary):
    """Word k is k times an ``x``, and what follows it is a space."""

    size = VOCAB

    @property
    def token_bytes(self) -> Tensor:
        return torch.arange(1.0, VOCAB + 1)

    def encode(self, text: str | bytes) -> Tensor:
        return torch.tensor([len(word) for word in str(text).split(" ")])

    def decode(self, tokens: Tensor) -> str:
        return " ".join("x" * int(token) for token in tokens)


class Texts(TextDataModule):
    """Random words; the last segments are shorter than the others."""

    vocabulary = Words()

    def load(self) -> TextSplits:
        generator = torch.Generator().manual_seed(1)
        return TextSplits(*(torch.randint(VOCAB, (N,), generator=generator) for N in (4 * 18, 47, 63)))


def texts(**arguments: Any) -> Texts:
    return Texts(**{"batch_size": 4, "segment_length": 5, "eval_batch_size": 3, **arguments})


def small(model: str = "deq_transformer", sizes: dict[str, Any] | None = None, **arguments: Any) -> LanguageModel:
    """The same small module each time, but for ``arguments``. What is read weighs enough for solves to converge."""
    deq = {"solver": EXACT, "gradient": ImplicitGradient(EXACT)} if model == "deq_transformer" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = LanguageModel(model, VOCAB, {**SIZES, **(sizes or {})}, **{"lr": 0.01, **deq, **arguments})
    if model == "deq_transformer":
        for weight in (module.model.injection.weight, module.model.vocabulary.words[0]):
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    return module

"""What all language models of the zoo do alike: log-probabilities, text generation, and what they refuse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .attention import RelativeAttention
from .errors import InputError
from .implicit.solvers.base import is_count
from .vocabulary import IGNORED, TiedVocabulary

M = TypeVar("M")
BYTES = 256


class TextModel(nn.Module, ABC):
    """A model of the next token, which reads a text segment by segment and remembers the ones before.

    A subclass has a ``vocabulary`` and a ``memory_length``, and says how it reads (:meth:`forward`) and what it last
    gave out (:meth:`last_output`). A memory is a pytree of tensors, batch first.

    Attributes:
        memory_length: positions that a memory holds; may be set at any time.
    """

    vocabulary: TiedVocabulary

    @property
    def memory_length(self) -> int:
        return self._memory_length

    @memory_length.setter
    def memory_length(self, positions: int) -> None:
        if not is_count(positions, 0):
            raise ValueError(f"memory_length takes an integer >= 0; given: {positions!r}")
        self._memory_length = positions

    @property
    def is_the_same_in_pieces(self) -> bool:
        """Whether what it gives at a position does not depend on how the text before is cut into segments.

        That is so where a memory has all that a segment would have read itself.
        """
        return True

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.edges[-1]

    @abstractmethod
    def forward(self, tokens: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """int64 ``(B, L)`` and what was before -> h ``(B, L, d)``, from which :meth:`nll` tells; the new memory."""

    @abstractmethod
    def last_output(self, memory: Any) -> Tensor | None:
        """H at the last position of a memory, ``(B, 1, d)``; None where it is empty."""

    def read_on(self, tokens: Tensor, memory: Any, places: Tensor | None) -> tuple[Tensor, Any]:
        """:meth:`forward` with a hint: ``places``, int64 ``(B, L)``, are positions of the memory that are alike.

        A subclass may begin from what the memory has there.
        """
        return cast(tuple[Tensor, Any], self(tokens, memory))

    def nll(self, h: Tensor, target: Tensor) -> Tensor:
        """-log p(target) in nats: ``(B, L, d)`` and int64 ``(B, L)`` -> ``(B, L)``; 0 where the target is -100.

        Raises:
            InputError: targets of another shape or dtype, or outside of the vocabulary.
        """
        if target.dtype != torch.int64 or target.shape != h.shape[:-1]:
            raise InputError(
                f"nll takes a target for each position, int64 {tuple(h.shape[:-1])}; given: {target.dtype} of shape "
                f"{tuple(target.shape)}"
            )
        self._check_range("targets", target.where(target != IGNORED, 0), f", or {IGNORED} where they do not count")
        return self.vocabulary.nll(h, target)

    def log_prob(self, tokens: Tensor, memory: M | None = None) -> tuple[Tensor, M]:
        """Log p of each token given all before it, in nats, and the memory with which to go on.

        Without a memory, or with an empty one, the first token is given: its entry is 0. A text in two pieces, the
        second one with the memory of the first, gets the values of the whole text as far as memories reach back (of a
        model that ``is_the_same_in_pieces``: not of one that is unrolled, nor of several blocks in one equilibrium).

        Shape:
            int64 ``(B, L)`` -> ``(B, L)``. Work and memory grow as L times L plus the memory's length.

        Raises:
            InputError: tokens of another shape or dtype, or outside of the vocabulary; a memory of another batch.
        """
        h, new = self(tokens, memory)
        before = None if memory is None else self.last_output(memory)
        if before is None:
            values = -self.nll(h[:, :-1], tokens[:, 1:])
            return torch.cat([values.new_zeros(len(values), 1), values], dim=1), new
        return -self.nll(torch.cat([before, h[:, :-1]], dim=1), tokens), new

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor | str | bytes,
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        memory: Any = None,
        generator: torch.Generator | None = None,
        warm_start: bool = True,
        lookahead: int = 8,
    ) -> Tensor | str:
        """Go on with a text.

        Each position attends to the ``memory_length`` ones before it, also in a prompt that is longer.

        Text repeats itself. Where the last tokens were read before, a warm start takes what the memory has there as
        the start of the next solve; and the tokens that followed there, up to ``lookahead`` of them, are read along in
        that solve. Of them those are kept that are then drawn: the text is the one that is written token by token, to
        the solver's tolerance, with fewer evaluations of the model (Saxena, "Prompt Lookup Decoding", 2023).

        Args:
            prompt: int64 ``(B, P)`` with P >= 1; or, for a model of bytes (``vocab_size=256``), a text.
            length: tokens to write.
            temperature: of the softmax that tokens are drawn from; 0 takes the most probable one.
            top_k: draw among so many most probable tokens.
            top_p: draw among the fewest most probable tokens that together have at least this probability (Holtzman
                et al., "The Curious Case of Neural Text Degeneration", ICLR 2020).
            memory: of a text that was read before the prompt.
            generator: of the random numbers; torch's global one if not given.
            warm_start: see above; without it each position is solved by itself, from the model's own start, as in a
                model that is not ``is_the_same_in_pieces``.
            lookahead: see above; 0 reads nothing along.

        Returns:
            What follows the prompt: int64 ``(B, length)``, or a text where the prompt is one, in which bytes that are
            no UTF-8 are replaced.

        The model should be in eval mode.

        Raises:
            InputError: an empty prompt; a text for a model whose tokens are not bytes; tokens out of the vocabulary.
            ValueError: another argument is out of its range.
        """
        _check(length, temperature, top_k, top_p, lookahead, self.memory_length)
        tokens = self._bytes_of(prompt) if isinstance(prompt, str | bytes) else prompt
        self.check_tokens(tokens)
        m = self.memory_length
        text, end = tokens, tokens.shape[1] + length
        warm_start = warm_start and self.is_the_same_in_pieces
        with self._seeing(m, lookahead if warm_start else 0):
            for segment in tokens.split(m, dim=1):
                h, memory = self(segment, _last(memory, m))
            h = h[:, -1:]
            guess = text[:, :0]
            while True:
                kept = 0  # how many guessed tokens were drawn indeed
                while True:
                    token = _draw(self.vocabulary.log_probs(h[:, kept]), temperature, top_k, top_p, generator)
                    text = torch.cat([text, token], dim=1)
                    if (
                        text.shape[1] == end
                        or kept == guess.shape[1]
                        or not torch.equal(token, guess[:, kept : kept + 1])
                    ):
                        break
                    kept += 1
                if text.shape[1] == end:
                    break
                memory = _last(memory, m, dropped=guess.shape[1] - kept)
                guess, places = look_back(text, _positions(memory), lookahead) if warm_start else (text[:, :0], None)
                h, memory = self.read_on(torch.cat([text[:, -1:], guess], dim=1), memory, places)
        new = text[:, tokens.shape[1] :]
        return new if isinstance(prompt, Tensor) else bytes(new[0].tolist()).decode("utf-8", errors="replace")

    @contextmanager
    def _seeing(self, before: int, lookahead: int) -> Iterator[None]:
        """Within this context each position sees so many before it, however many are read at once.

        A memory has room for tokens that may have to be dropped again.
        """
        layers = [module for module in self.modules() if isinstance(module, RelativeAttention)]
        spans = [layer.span for layer in layers]
        try:
            self.memory_length = before + lookahead
            for layer in layers:
                layer.span = min(layer.span, before + 1)
            yield
        finally:
            self.memory_length = before
            for layer, span in zip(layers, spans, strict=True):
                layer.span = span

    def remembered(self, old: Tensor, new: Tensor) -> Tensor:
        """The last memory_length positions of ``(B, m, *)`` and ``(B, L, *)``, without their graph."""
        both = torch.cat([old, new], dim=1).detach()
        return both[:, max(0, both.shape[1] - self.memory_length) :]

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise InputError unless these are tokens of the vocabulary, ``(B, L)`` with L >= 1."""
        name = type(self).__name__
        if not isinstance(tokens, Tensor):
            raise InputError(
                f"{name} takes tokens int64 (B, L); given: {type(tokens).__name__}. generate() takes text, and the "
                "encode() of a data module makes tokens of it"
            )
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.shape[1] == 0:
            raise InputError(
                f"{name} takes tokens int64 (B, L) with L >= 1; given: {tokens.dtype} of shape {tuple(tokens.shape)}"
                + (". A text begins with one token at least, like '\\n'" if 0 in tokens.shape[1:] else "")
            )
        self._check_range("tokens", tokens)

    def check_memory(self, memory: Any, tokens: Tensor, widths: Sequence[int]) -> None:
        """Raise InputError unless the memory is of this model, ``(B, m, width)`` each, and of as many texts."""
        shapes = [tuple(getattr(x, "shape", ())) for x in pytree.tree_leaves(memory)]
        positions = shapes[0][1] if shapes and len(shapes[0]) == 3 else 0
        if shapes != [(len(tokens), positions, width) for width in widths]:
            raise InputError(
                f"a memory is of this {type(self).__name__}, and of the same texts as the tokens: "
                f"{', '.join(f'({len(tokens)}, m, {width})' for width in widths)}; given: "
                f"{', '.join(map(str, shapes))}. Give memory=None where other texts begin"
            )

    def _check_range(self, what: str, tokens: Tensor, more: str = "") -> None:
        low, high = torch.stack(tokens.aminmax()).tolist() if tokens.numel() else (0, 0)  # one transfer to the host
        if low < 0 or high >= self.vocab_size:
            raise InputError(
                f"{what} are from 0 to {self.vocab_size - 1} (vocab_size={self.vocab_size}){more}; given: from {low} "
                f"to {high}"
            )

    def _bytes_of(self, text: str | bytes) -> Tensor:
        if self.vocab_size != BYTES:
            raise InputError(
                f"this {type(self).__name__} has {self.vocab_size} tokens, which are not bytes: give it tokens, "
                "int64 (B, L), as the encode() of its data module makes them"
            )
        data = text.encode() if isinstance(text, str) else text
        return torch.tensor([list(data)], dtype=torch.int64, device=self.vocabulary.words[0].device)


def look_back(text: Tensor, positions: int, most: int, longest: int = 16) -> tuple[Tensor, Tensor]:
    """Where in the memory a text was as it is at its end, and what followed there.

    Among the memory's positions, which are those before the last token of the text, that one is taken whose token and
    predecessors agree with the end of the text furthest back, and the latest of equals.

    Args:
        text: int64 ``(B, n)``.
        positions: that the memory has, the last of them that of ``text[:, n - 2]``.
        most: tokens that are guessed; no more than agree in every text.
        longest: agreement is looked at so far back.

    Returns:
        the guessed tokens, int64 ``(B, g)``, and for the text's last token and each guessed one a position of the
        memory, counted from its first one, int64 ``(B, 1 + g)``; -1 in texts without any agreement.
    """
    B, n = text.shape
    known = min(positions, n - 1)  # a memory may reach back further than the text that is known
    agreement = torch.zeros(B, known, dtype=torch.int64, device=text.device)
    if not known or not B:
        return text[:, :0], text.new_full((B, 1), -1)
    going_on = torch.ones_like(agreement, dtype=torch.bool)
    padded = F.pad(text, (longest, 0), value=-1)
    for back in range(min(longest, n)):
        last = longest + n - 1 - back
        going_on = going_on & (padded[:, last - known : last] == padded[:, last, None])
        agreement += going_on
    best = known - 1 - agreement.flip(1).argmax(dim=1, keepdim=True)  # the latest of equals
    agreed = agreement.gather(1, best)
    g = min(most, int(agreed.min()))
    period = known - best  # the text goes on as it did there; past its end, again as from there
    steps = torch.arange(1 + g, device=text.device) % period
    places = (best + steps + positions - known).where(agreed > 0, -1)
    followed = n - known + best + torch.arange(g, device=text.device) % period
    return text.gather(1, followed), places


def _last(memory: Any, length: int, dropped: int = 0) -> Any:
    """The last positions of a memory, after some at its end were dropped."""

    def cut(x: Tensor) -> Tensor:
        end = x.shape[1] - dropped
        return x[:, max(0, end - length) : end]

    return pytree.tree_map_only(Tensor, cut, memory)


def _positions(memory: Any) -> int:
    return int(pytree.tree_leaves(memory)[0].shape[1])


def _check(
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    lookahead: int,
    memory_length: int,
) -> None:
    if not is_count(length, 1):
        raise ValueError(f"generate(length=...) takes an integer >= 1; given: {length!r}")
    if not (isinstance(temperature, int | float) and 0 <= temperature < math.inf):
        raise ValueError(f"generate(temperature=...) takes a finite number >= 0; given: {temperature!r}")
    if top_k is not None and not is_count(top_k, 1):
        raise ValueError(f"generate(top_k=...) takes an integer >= 1, or None; given: {top_k!r}")
    if top_p is not None and not (isinstance(top_p, int | float) and 0 < top_p <= 1):
        raise ValueError(f"generate(top_p=...) takes a probability in (0, 1], or None; given: {top_p!r}")
    if not is_count(lookahead, 0):
        raise ValueError(f"generate(lookahead=...) takes an integer >= 0; given: {lookahead!r}")
    if memory_length < 1:
        raise ValueError(
            "generate reads each token with the memory of those before it, and this model has memory_length=0; set "
            "model.memory_length"
        )


def _draw(
    log_p: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token a row: ``(B, V)`` -> int64 ``(B, 1)``."""
    if temperature == 0:
        return log_p.argmax(dim=1, keepdim=True)
    p, tokens = (
        ((log_p - log_p.amax(dim=1, keepdim=True)) / temperature)
        .softmax(dim=1)
        .sort(dim=1, descending=True, stable=True)
    )
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        before = p.cumsum(dim=1) - p
        p = p.where(before < top_p * p.sum(dim=1, keepdim=True), 0)
    return tokens.gather(1, torch.multinomial(p, 1, generator=generator))

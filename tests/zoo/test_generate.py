"""Generation that looks back: the same text, with fewer evaluations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from datamodules import PyDocsDataModule
from zoo.implicit import Anderson
from zoo.language import look_back

Make = Callable[..., zoo.DEQTransformer | zoo.StackedTransformer]


def deq(**arguments: Any) -> zoo.DEQTransformer:
    """A small model in float64, solved tightly."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 8, "d_model": 16, "num_heads": 2, "d_inner": 24, "memory_length": 12}
    model = zoo.DEQTransformer(**{**sizes, "start": "local", **arguments}, solver=Anderson(tol=1e-9, max_steps=200))
    for block in model.cell.blocks:
        nn.init.constant_(block.feed_forward.outer.parametrizations.weight.original0, 0.1)  # contracts
    return model.double().eval()


def stacked(**arguments: Any) -> zoo.StackedTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 8, "d_model": 16, "num_heads": 2, "d_inner": 24, "memory_length": 12}
    return zoo.StackedTransformer(**{**sizes, "start": "local", **arguments}).double().eval()


def evaluations(model: Any, length: int = 40, **arguments: Any) -> tuple[Tensor, int]:
    """What it writes, and how often the cell is evaluated for that."""
    counted = 0

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1

    handle = model.deq.cell.register_forward_hook(count)
    try:
        written = model.generate(length=length, temperature=0, **arguments)
    finally:
        handle.remove()
    assert isinstance(written, Tensor)
    return written, counted


@pytest.mark.parametrize("texts", [1, 3])
def test_warm_starts_write_the_same_with_fewer_evaluations(texts: int) -> None:
    """In a text that repeats itself: one token is always the most probable one."""
    model = deq()
    nn.init.constant_(model.vocabulary.biases[0][3], 100.0)
    prompt = torch.randint(8, (texts, 7), generator=torch.Generator().manual_seed(texts))
    cold, most = evaluations(model, prompt=prompt, warm_start=False)
    warm, fewer = evaluations(model, prompt=prompt, lookahead=0)
    looking_ahead, least = evaluations(model, prompt=prompt)
    assert torch.equal(warm, cold)
    assert torch.equal(looking_ahead, cold)
    assert least < fewer < most
    assert 2 * least <= most


@pytest.mark.parametrize("make", [deq, stacked])
@pytest.mark.parametrize("lookahead", [1, 3, 20])
def test_what_is_read_along_changes_no_draw(make: Make, lookahead: int) -> None:
    """Drawn tokens too are those of reading one by one, also long after the memory is full."""
    model = make()
    prompt = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3]])

    def write(**arguments: Any) -> Tensor:
        written = model.generate(
            prompt, 50, temperature=0.2, top_k=5, generator=torch.Generator().manual_seed(5), **arguments
        )
        assert isinstance(written, Tensor)
        return written

    assert torch.equal(write(lookahead=lookahead), write(warm_start=False))


@pytest.mark.parametrize("make", [deq, stacked])
def test_each_position_sees_as_many_before_it_however_a_prompt_is_cut(make: Make) -> None:
    """What is written after a prompt is the same when most of it is given as a memory, beyond the model's own too."""
    model = make()
    prompt = torch.randint(8, (2, 40), generator=torch.Generator().manual_seed(2))
    whole = model.generate(prompt, 5, temperature=0)
    model.memory_length = 12
    with model._seeing(12, 0):
        memory = None
        for segment in prompt[:, :30].split(7, dim=1):
            _, memory = model(segment, memory)
    assert torch.equal(torch.as_tensor(model.generate(prompt[:, 30:], 5, temperature=0, memory=memory)), whole)


@pytest.mark.parametrize("make", [deq, stacked])
def test_the_model_is_left_as_it_was(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(memory_length=6, attention_span=50)
    spans = [module.span for module in model.modules() if hasattr(module, "span")]
    prompt = torch.tensor([[1, 2, 3]])
    model.generate(prompt, 20)
    monkeypatch.setattr(type(model), "read_on", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(prompt, 20)
    assert model.memory_length == 6
    assert [module.span for module in model.modules() if hasattr(module, "span")] == spans


def by_hand(text: list[int], positions: int) -> tuple[int, int]:
    """How far back the best place agrees, and which position of the memory that is, one comparison at a time."""
    n, best = len(text), (0, -1)
    for i in range(max(0, n - 1 - positions), n - 1):
        back = 0
        while back < 16 and back <= i and text[i - back] == text[n - 1 - back]:
            back += 1
        if back and back >= best[0]:
            best = (back, i)
    return best[0], -1 if best[1] < 0 else best[1] - (n - 1 - positions)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
    st.integers(0, 40),
    st.integers(0, 6),
)
def test_looking_back(text: list[int], positions: int, most: int) -> None:
    n = len(text)
    agreed, place = by_hand(text, positions)
    guess, places = look_back(torch.tensor([text]), positions, most)
    assert guess.shape == (1, min(most, agreed))
    assert int(places[0, 0]) == place
    assert places.shape == (1, 1 + guess.shape[1])
    going_on = text[:]
    for token, where in zip(guess[0].tolist(), places[0, 1:].tolist(), strict=True):
        at = where - positions + n - 1  # in the text
        assert 0 <= at < n - 1
        assert going_on[at] == token or (at == n - 1 - (n - 1 - at))
        going_on.append(token)
    if agreed:
        period = n - 1 - (place - positions + n - 1)
        assert all(going_on[i] == going_on[i - period] for i in range(n, len(going_on)))


def test_several_texts_guess_as_far_as_all_agree() -> None:
    text = torch.tensor([[1, 2, 3, 1, 2], [7, 8, 9, 5, 6]])
    guess, places = look_back(text, 4, 8)
    assert guess.shape == (2, 0)
    assert places.tolist() == [[1], [-1]]
    guess, places = look_back(text[:1], 4, 8)
    assert guess.tolist() == [[3, 1]]
    assert places.tolist() == [[1, 2, 3]]


def test_the_shipped_weights_know_their_text() -> None:
    """As the record says, on some of the test text; which text that is depends on the version of Python."""
    (record,) = zoo.list_weights("deq_transformer_nano.pydocs")
    model = zoo.load_pretrained(record.name)
    model.deq.on_failure = "ignore"  # the record says how many are solved
    data = PyDocsDataModule(segment_length=256)
    memory, nats, count = None, 0.0, 0
    with torch.no_grad():
        for tokens, _ in itertools.islice(data.test_dataloader(), 3):
            values, memory = model.log_prob(tokens, memory)
            nats, count = nats - float(values.sum()), count + values.numel()
    bits = nats / count / math.log(2)
    assert bits == pytest.approx(record.metrics["test_bits_per_byte"], abs=0.3)


def test_the_shipped_weights_write_with_half_the_evaluations() -> None:
    """What the issue of warm starts asks: the same bytes, taking the most probable one each time."""
    model = zoo.load_pretrained("deq_transformer_nano.pydocs")
    prompt = torch.tensor([list(b'help("dict")\n\nReturn a new dictionary ')])
    cold, most = evaluations(model, 160, prompt=prompt, warm_start=False)
    warm, fewer = evaluations(model, 160, prompt=prompt)
    assert torch.equal(warm, cold)
    assert 2 * fewer <= most


def test_a_negative_lookahead() -> None:
    with pytest.raises(ValueError, match=r"lookahead=\.\.\.\) takes an integer >= 0; given: -1"):
        stacked().generate(torch.zeros(1, 1, dtype=torch.int64), 2, lookahead=-1)


def test_an_unrolled_model_starts_as_ever() -> None:
    """From another start it would be another function, and what is read along would be read with other states."""
    model = deq(norm="sub", layers=2, unrolled=5)
    prompt = torch.randint(8, (1, 9), generator=torch.Generator().manual_seed(4))
    for temperature in (0.0, 1.0):
        warm, cold = (
            model.generate(prompt, 40, temperature, generator=torch.Generator().manual_seed(5), warm_start=warm_start)
            for warm_start in (True, False)
        )
        assert torch.equal(torch.as_tensor(warm), torch.as_tensor(cold))


def test_no_text_at_all() -> None:
    assert torch.as_tensor(deq().generate(torch.zeros(0, 3, dtype=torch.int64), 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 2.5}, r"length=\.\.\.\) takes an integer >= 1; given: 2\.5"),
        ({"length": 2, "top_k": 2.5}, r"top_k=\.\.\.\) takes an integer >= 1, or None; given: 2\.5"),
        ({"length": 2, "temperature": "warm"}, r"temperature=\.\.\.\) takes a finite number >= 0; given: 'warm'"),
        ({"length": 2, "top_p": "all"}, r"top_p=\.\.\.\) takes a probability in \(0, 1\], or None; given: 'all'"),
    ],
)
def test_arguments_of_other_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stacked().generate(torch.zeros(1, 1, dtype=torch.int64), **arguments)


def test_the_coldest_temperature_takes_the_most_probable() -> None:
    prompt = torch.tensor([[1, 2, 3]])
    model = stacked()
    assert torch.equal(
        torch.as_tensor(model.generate(prompt, 9, temperature=1e-40)),
        torch.as_tensor(model.generate(prompt, 9, temperature=0)),
    )


@pytest.mark.parametrize("make", [deq, stacked])
def test_memories_and_tokens_of_something_else(make: Make) -> None:
    model = make()
    tokens = torch.tensor([[1, 2, 3]])
    _, memory = model(tokens)
    again, _ = model(tokens, tuple(torch.as_tensor(x) for x in memory))  # as a file has it
    assert torch.equal(again, model(tokens, memory)[0])
    assert torch.equal(model.log_prob(tokens, tuple(memory))[0], model.log_prob(tokens, memory)[0])
    for wrong in (memory[:1], [x[..., :5] for x in memory], [x.expand(2, -1, -1) for x in memory], torch.ones(())):
        with pytest.raises(zoo.InputError, match=r"of the same texts as the tokens: .* Give memory=None where"):
            model(tokens, wrong)
    with pytest.raises(zoo.InputError, match=r"given: str\. generate\(\) takes text"):
        model.log_prob("abc")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory_length takes an integer >= 0; given: -3"):
        model.memory_length = -3

"""The explicit baseline: it remembers, does not look ahead, and has the interface of the equilibrium model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo

SMALL: dict[str, Any] = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "d_inner": 12, "layers": 3}


def stacked(**changes: Any) -> zoo.StackedTransformer:
    """With large weights, in float64 and eval mode."""
    torch.manual_seed(0)
    model = zoo.StackedTransformer(**{**SMALL, "memory_length": 100, **changes}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def text(B: int, L: int) -> Tensor:
    return torch.randint(11, (B, L), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cutoffs", [(), (4, 8)])
@pytest.mark.parametrize("pieces", [(1, 11), (5, 7), (4, 4, 4), (1,) * 12])
def test_a_text_in_pieces(pieces: tuple[int, ...], cutoffs: tuple[int, ...]) -> None:
    model, tokens = stacked(cutoffs=cutoffs, div_val=2), text(2, 12)
    whole, _ = model.log_prob(tokens)
    memory, values = None, []
    for piece in tokens.split(pieces, dim=1):
        found, memory = model.log_prob(piece, memory)
        values.append(found)
    assert memory is not None
    assert [tuple(x.shape) for x in memory] == [(2, 12, 8)] * 4
    assert not any(x.requires_grad for x in memory)
    torch.testing.assert_close(torch.cat(values, dim=1), whole, rtol=0, atol=1e-12)


def test_memory_has_its_length() -> None:
    model = stacked(memory_length=5)
    for length, kept in ((5, 5), (2, 2), (0, 0)):
        model.memory_length = length
        _, memory = model(text(2, 12))
        assert [tuple(x.shape) for x in memory] == [(2, kept, 8)] * 4
    assert model.last_output(memory) is None
    again, _ = model.log_prob(text(2, 4), memory)
    torch.testing.assert_close(again, model.log_prob(text(2, 4))[0])


def test_it_does_not_look_ahead() -> None:
    model, tokens = stacked(), text(2, 9)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    a, b = model.log_prob(tokens)[0], model.log_prob(changed)[0]
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=0, atol=0)
    assert (a[:, 6:] != b[:, 6:]).all()


def test_the_layers_are_their_equation() -> None:
    """A text of one position, where attention gives v."""
    model, tokens = stacked(), text(3, 1)
    z = model.vocabulary.embed(tokens)
    for layer in model.layers:
        layer: Any
        x = F.layer_norm(z, (8,), layer.norm1.weight, layer.norm1.bias)
        v = x @ layer.attention.qkv.weight[16:].T
        z = z + F.linear(v, layer.attention.output.weight, layer.attention.output.bias)
        x = F.layer_norm(z, (8,), layer.norm2.weight, layer.norm2.bias)
        inner, outer = layer.feed_forward.inner, layer.feed_forward.outer
        z = z + F.linear(F.linear(x, inner.weight, inner.bias).relu(), outer.weight, outer.bias)
    torch.testing.assert_close(model(tokens)[0], model.norm(z), rtol=0, atol=1e-12)


def test_training_reaches_every_parameter() -> None:
    model = stacked(dropout=0.1, cutoffs=(4, 8), div_val=2).train()
    _, memory = model(text(3, 8))
    h, _ = model(text(3, 8), memory)
    model.nll(h, text(3, 8)).mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_generate() -> None:
    model = stacked()
    prompt = text(2, 5)
    new = model.generate(prompt, length=6, temperature=0)
    assert isinstance(new, Tensor)
    whole = torch.cat([prompt, new], dim=1)
    h, _ = model(whole)
    assert torch.equal(model.vocabulary.log_probs(h[:, 4:-1]).argmax(dim=2), new)


def test_parameter_counts() -> None:
    V, d, n, d_inner = 256, 128, 3, 512
    layer = 3 * d * d + d * d + d * d + d + 2 * d + 2 * d * d_inner + d_inner + d + 4 * d  # qkv, r, o, b, ff, norms
    model = zoo.create_model("stacked_transformer", vocab_size=V, d_model=d, layers=n, d_inner=d_inner)
    assert sum(parameter.numel() for parameter in model.parameters()) == V * d + V + n * layer + 2 * d
    assert zoo.list_models("stacked*") == ["stacked_transformer", "stacked_transformer_nano"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"layers": 0}, ["StackedTransformer(layers=...)", ">= 1", "0"]),
        ({"num_heads": 3}, ["StackedTransformer", "d_model=8", "num_heads=3"]),
        ({"memory_length": -1}, ["memory_length", ">= 0", "-1"]),
    ],
)
def test_sizes_that_make_no_sense(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        zoo.StackedTransformer(**{**SMALL, **changes})
    assert all(part in str(error.value) for part in parts), error.value


def test_a_memory_of_another_batch() -> None:
    model = stacked()
    _, memory = model(text(2, 4))
    with pytest.raises(zoo.InputError, match=r"\(3, m, 8\); given: \(2, 4, 8\), .*\. Give memory=None"):
        model(text(3, 4), memory)
    with pytest.raises(zoo.InputError, match=r"StackedTransformer takes tokens int64 \(B, L\) with L >= 1"):
        model(text(2, 0))

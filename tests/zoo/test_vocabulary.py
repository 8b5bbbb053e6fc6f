"""Embedding and output layer: against one matrix a token, and one softmax over all tokens, made by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.vocabulary import IGNORED, TiedVocabulary


def vocabulary(V: int, d: int, cutoffs: tuple[int, ...] = (), div_val: int = 2) -> TiedVocabulary:
    """With random weights in float64, biases too."""
    torch.manual_seed(0)
    layer = TiedVocabulary(V, d, cutoffs, div_val).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def dense_log_softmax(layer: TiedVocabulary, h: Tensor) -> Tensor:
    """``(N, d)`` -> ``(N, V)``, token by token."""
    clusters = list(itertools.pairwise(layer.edges))
    if len(clusters) == 1:
        logits = [h @ layer.words[0][token] + layer.biases[0][token] for token in range(layer.edges[-1])]
        return torch.stack(logits, dim=1).log_softmax(dim=1)
    hidden = h @ layer.head_projection
    columns = [hidden @ word + bias for word, bias in zip(layer.words[0], layer.biases[0], strict=True)]
    columns += [hidden @ w + bias for w, bias in zip(layer.cluster_weight, layer.cluster_bias, strict=True)]
    head = torch.stack(columns, dim=1).log_softmax(dim=1)
    out = [head[:, token] for token in range(layer.edges[1])]
    for i, _ in enumerate(clusters[1:], start=1):
        here = h @ layer.projections[i]
        logits = [here @ word + bias for word, bias in zip(layer.words[i], layer.biases[i], strict=True)]
        inside = torch.stack(logits, dim=1).log_softmax(dim=1)
        # The last column of the head is cluster 1, the one before it cluster 2, and so on.
        out += [head[:, head.shape[1] - i] + column for column in inside.unbind(1)]
    return torch.stack(out, dim=1)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    V = draw(st.integers(2, 12))
    clusters = draw(st.integers(0, min(3, V - 1)))
    cutoffs = draw(st.sets(st.integers(1, V - 1), min_size=clusters, max_size=clusters))
    return {"V": V, "d": 8, "cutoffs": tuple(sorted(cutoffs)), "div_val": draw(st.integers(1, 2))}


@settings(max_examples=25, deadline=None)
@given(arguments=sizes(), data=st.data())
def test_losses_are_those_of_one_softmax(arguments: dict[str, Any], data: st.DataObject) -> None:
    layer, V = vocabulary(**arguments), arguments["V"]
    B, L = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    h = torch.randn(B, L, 8, dtype=torch.float64)
    target = torch.randint(V, (B, L)).where(torch.rand(B, L) > 0.2, IGNORED)
    dense = dense_log_softmax(layer, h.flatten(0, 1)).unflatten(0, (B, L))
    torch.testing.assert_close(dense.exp().sum(dim=2), torch.ones(B, L, dtype=torch.float64))
    torch.testing.assert_close(layer.log_probs(h), dense, rtol=1e-12, atol=1e-12)
    expected = -dense.gather(2, target.clamp(min=0).unsqueeze(2)).squeeze(2) * (target != IGNORED)
    torch.testing.assert_close(layer.nll(h, target), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(arguments=sizes(), data=st.data())
def test_each_token_has_its_vector(arguments: dict[str, Any], data: st.DataObject) -> None:
    layer, V = vocabulary(**arguments), arguments["V"]
    tokens = torch.randint(V, (data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))))
    table = []
    for i, (first, last) in enumerate(itertools.pairwise(layer.edges)):
        words = layer.words[i]
        assert len(words) == last - first
        table += [8**0.5 * (layer.projections[i] @ word if arguments["cutoffs"] else word) for word in words]
    torch.testing.assert_close(layer.embed(tokens), torch.stack(table)[tokens], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cutoffs", [(), (2, 4)])
def test_gradients(cutoffs: tuple[int, ...]) -> None:
    layer = vocabulary(6, 4, cutoffs)
    h = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 5, IGNORED], [3, 2, 0]])
    parameters = list(layer.parameters())

    def both(h: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return layer.nll(h, target), layer.embed(target.clamp(min=0))

    assert torch.autograd.gradcheck(both, (h, *parameters))


def test_what_does_not_count_has_no_gradient() -> None:
    layer = vocabulary(6, 4, (2, 4))
    h = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 5, 1], [3, 2, 4]])
    target[1] = IGNORED
    values = layer.nll(h, target)
    values.sum().backward()
    assert h.grad is not None
    assert (values[1] == 0).all()
    assert (h.grad[1] == 0).all()
    assert (h.grad[0] != 0).all()
    assert (layer.nll(h, torch.full_like(target, IGNORED)) == 0).all()


@pytest.mark.parametrize("cutoffs", [(), (2, 4)])
def test_under_autocast(cutoffs: tuple[int, ...]) -> None:
    layer = vocabulary(6, 4, cutoffs).float()
    h, target = torch.randn(2, 3, 4), torch.tensor([[0, 5, 1], [3, 2, 4]])
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer.nll(h, target)
    torch.testing.assert_close(narrow.float(), layer.nll(h, target), rtol=0.05, atol=0.2)
    assert narrow.dtype == torch.float32


def test_weights_start_small_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    layer = TiedVocabulary(500, 32, (100, 200))
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            assert not parameter.any()
        elif parameter.numel() > 500:
            assert 0.008 < parameter.std() < 0.012
    assert [tuple(words.shape) for words in layer.words] == [(100, 32), (100, 8), (300, 2)]
    assert "vocab_size=500, d_model=32, cutoffs=(100, 200)" in repr(layer)

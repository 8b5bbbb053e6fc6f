"""DEQ transformers: they do not look ahead, remember what they read, and drop, differentiate and solve as described."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import zoo
from zoo.implicit import (
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    PhantomGradient,
    UnrolledGradient,
    VariationalDropout,
    jacobian_penalty,
)
from zoo.transformer import Past, TransformerCell

TIGHT = Anderson(tol=1e-13, max_steps=300)
SMALL: dict[str, Any] = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "d_inner": 12, "memory_length": 100}
every_norm = pytest.mark.parametrize("norm", ["post", "pre", "sub"])
every_equilibrium = pytest.mark.parametrize("norm", ["post", "pre"])  # "sub" has none that is isolated; see below


def transformer(**changes: Any) -> zoo.DEQTransformer:
    """With large weights but a contracting cell, in float64 and eval mode, solved to the limit."""
    torch.manual_seed(0)
    tight: dict[str, Any] = {"solver": TIGHT, "gradient": ImplicitGradient(TIGHT)}
    if changes.get("norm") == "sub":
        tight["unrolled"] = 6
    model = zoo.DEQTransformer(**{**SMALL, **tight, **changes}).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("vocabulary", "injection")) or "bias" in name:
                parameter.normal_(std=0.3)
        for block in model.cell.blocks:
            for layer in (block.attention.output, block.feed_forward.outer):  # type: ignore[union-attr]
                scaled(layer, 0.4)
    return model


def scaled(layer: Any, factor: float) -> None:
    weight = layer.parametrizations.weight.original0 if parametrize.is_parametrized(layer) else layer.weight
    weight.mul_(factor)


def text(B: int, L: int, V: int = 11) -> Tensor:
    return torch.randint(V, (B, L), generator=torch.Generator().manual_seed(1))


def cell_inputs(model: zoo.DEQTransformer, B: int, L: int, m: int) -> tuple[Tensor, Tensor, tuple[Past, ...]]:
    """Random z, u, and the past of a random memory, in the model's dtype."""
    d, u = model.vocabulary.d_model, model.injection.out_features
    like = model.injection.weight
    generator = torch.Generator().manual_seed(2)
    z, ur, mz, mu = (
        torch.randn(B, n, width, generator=generator, dtype=torch.float64).to(like.dtype)
        for n, width in ((L, d), (L, u), (m, d), (m, u))
    )
    return z, ur, model.cell.past(zoo.Memory(mz, mu), L)


# ----------------------------------------------------------------------------------------------- it does not look ahead


@every_norm
def test_later_tokens_change_nothing_before(norm: str) -> None:
    model, tokens = transformer(norm=norm, cutoffs=(4, 8), div_val=2), text(2, 9)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    with torch.no_grad():
        a, b = model.log_prob(tokens)[0], model.log_prob(changed)[0]
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=0, atol=1e-10)
    assert ((a - b)[:, 6:].abs() > 1e-6).all()


@every_norm
def test_the_gradient_does_not_look_ahead(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = transformer(norm=norm), text(2, 9)
    e = model.vocabulary.embed(tokens).detach().requires_grad_()
    monkeypatch.setattr(model.vocabulary, "embed", lambda tokens: e)
    values, _ = model.log_prob(tokens)
    values[:, 6].sum().backward()
    assert e.grad is not None
    assert (e.grad[:, 6:] == 0).all()
    assert (e.grad[:, :6].abs().sum(dim=2) > 0).all()


# --------------------------------------------------------------------------------------------------------- it remembers


@every_equilibrium
@pytest.mark.parametrize("pieces", [(1, 11), (5, 7), (4, 4, 4)])
def test_a_text_in_pieces(norm: str, pieces: tuple[int, ...]) -> None:
    model, tokens = transformer(norm=norm), text(2, 12)
    with torch.no_grad():
        whole, _ = model.log_prob(tokens)
        memory, values = None, []
        for piece in tokens.split(pieces, dim=1):
            found, memory = model.log_prob(piece, memory)
            values.append(found)
    assert (whole[:, 0] == 0).all()
    torch.testing.assert_close(torch.cat(values, dim=1), whole, rtol=0, atol=1e-9)


def test_a_text_in_pieces_with_a_span() -> None:
    """Where one attends to 4 positions, a memory of 3 is as good as the whole text."""
    model, tokens = transformer(attention_span=4, memory_length=3), text(2, 12)
    with torch.no_grad():
        whole, _ = model.log_prob(tokens)
        first, memory = model.log_prob(tokens[:, :6])
        assert memory.z.shape[1] == 3
        second, _ = model.log_prob(tokens[:, 6:], memory)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-9)
    with torch.no_grad():
        unlimited, _ = transformer().log_prob(tokens)
    assert ((whole - unlimited)[:, :4].abs() < 1e-9).all()
    assert ((whole - unlimited)[:, 5:].abs() > 1e-9).all()


def test_several_blocks_remember_the_equilibrium_only() -> None:
    """So each reads in a memory what the last one gave out, which no text in one piece has."""
    model, tokens = transformer(layers=2), text(2, 12)
    with torch.no_grad():
        whole, _ = model.log_prob(tokens)
        _, memory = model.log_prob(tokens[:, :6])
        second, _ = model.log_prob(tokens[:, 6:], memory)
    torch.testing.assert_close(second[:, 0], whole[:, 6], rtol=0, atol=1e-9)
    assert ((second - whole[:, 6:])[:, 1:].abs() > 1e-9).all()


def test_the_memory_has_its_length() -> None:
    model, tokens = transformer(memory_length=5), text(2, 12)
    _, whole = model(tokens)
    for length, kept in ((7, 7), (100, 12), (2, 2), (0, 0)):  # set on a live model
        model.memory_length = length
        h, memory = model(tokens)
        assert [tuple(x.shape) for x in memory] == [(2, kept, 8), (2, kept, 24)]
        assert not any(x.requires_grad for x in memory)
        assert torch.equal(memory.z, h[:, 12 - kept :])
    model.memory_length = 7
    _, memory = model(tokens[:, 5:], model(tokens[:, :5])[1])
    torch.testing.assert_close(memory.z[:, 2:], whole.z, rtol=0, atol=1e-9)
    empty = zoo.Memory(memory.z[:, :0], memory.u[:, :0])
    torch.testing.assert_close(model.log_prob(tokens, empty)[0], model.log_prob(tokens)[0], rtol=0, atol=0)


def test_tokens_and_memories_that_do_not_fit() -> None:
    model = transformer()
    _, memory = model(text(2, 4))
    with pytest.raises(zoo.InputError, match=r"given: \(2, 4, 8\), \(2, 4, 24\)\. Give memory=None"):
        model(text(3, 4), memory)
    for tokens, message in (
        (text(2, 0), r"int64 \(B, L\) with L >= 1; given: torch.int64 of shape \(2, 0\)\. A text begins"),
        (text(2, 4).int(), r"given: torch.int32 of shape \(2, 4\)"),
        (text(2, 4)[0], r"given: torch.int64 of shape \(4,\)"),
        (text(2, 4) + 11, r"tokens are from 0 to 10 \(vocab_size=11\); given: from"),
        (text(2, 4) - 11, r"tokens are from 0 to 10 \(vocab_size=11\); given: from -"),
    ):
        with pytest.raises(zoo.InputError, match=message):
            model(tokens)
    h, _ = model(text(2, 4))
    with pytest.raises(zoo.InputError, match=r"targets are from 0 to 10 \(vocab_size=11\), or -100 where"):
        model.nll(h, text(2, 4) + 11)
    with pytest.raises(zoo.InputError, match=r"int64 \(2, 4\); given: torch.int64 of shape \(2, 3\)"):
        model.nll(h, text(2, 3))


# ------------------------------------------------------------------------------------------------------------- the cell


def copies_of(model: zoo.DEQTransformer, dtype: torch.dtype, *, fused: bool, **sizes: int) -> Tensor:
    with torch.set_grad_enabled(not fused):
        z, u, past = cell_inputs(model.to(dtype), **sizes)
        out: Tensor = model.cell(z, u, past)
        return out.detach()


@pytest.mark.parametrize("sizes", [(2, 5, 3), (1, 1, 0), (3, 1, 4), (2, 6, 0), (0, 3, 2)], ids=str)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("span", [3, 1000])
def test_fused_attention_is_the_same(sizes: tuple[int, ...], dtype: torch.dtype, atol: float, span: int) -> None:
    model, named = transformer(attention_span=span), dict(zip(("B", "L", "m"), sizes, strict=True))
    explicit, fused = (copies_of(model, dtype, fused=fused, **named) for fused in (False, True))
    assert explicit.dtype == fused.dtype == dtype
    torch.testing.assert_close(fused, explicit, rtol=0, atol=atol)


def test_under_autocast() -> None:
    model = transformer().float()
    exact = copies_of(model, torch.float32, fused=True, B=2, L=5, m=3)
    with torch.autocast("cpu", torch.bfloat16):
        for fused in (False, True):
            found = copies_of(model, torch.float32, fused=fused, B=2, L=5, m=3)
            torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.05)
        h, memory = zoo.DEQTransformer(**SMALL)(text(2, 5))
    assert h.dtype == torch.float32
    assert memory.z.dtype == torch.float32


@every_norm
def test_an_output_depends_on_what_it_may_see(norm: str) -> None:
    """The Jacobian of one evaluation: position i on i - 2, i - 1 and i where the span is 3."""
    model = transformer(norm=norm, attention_span=3)
    z, u, past = cell_inputs(model, 1, 6, 2)
    J = torch.autograd.functional.jacobian(lambda z: model.cell(z, u, past), z)
    seen = J.abs().amax(dim=(0, 2, 3, 5)) > 0
    i, j = torch.arange(6).view(6, 1), torch.arange(6)
    assert torch.equal(seen, (j <= i) & (j > i - 3))


@pytest.mark.parametrize("layers", [1, 2])
def test_equilibria_of_sub_norm_are_not_isolated(layers: int) -> None:
    """f(z + c) = f(z) + c for a c that all features share: the Jacobian has the eigenvalue 1."""
    model = transformer(norm="sub", layers=layers)
    z, u, past = cell_inputs(model, 2, 5, 3)
    c = torch.randn(2, 5, 1, dtype=torch.float64)
    torch.testing.assert_close(model.cell(z + c, u, past), model.cell(z, u, past) + c, rtol=0, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    H, D, B, V = draw(1, 3), draw(1, 3), draw(0, 3), draw(1, 6)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    model = zoo.DEQTransformer(
        vocab_size=V,
        d_model=2 * draw(1, 4),
        num_heads=H,
        d_head=D,
        d_inner=draw(1, 5),
        layers=draw(1, 2),
        norm=data.draw(st.sampled_from(["post", "pre", "sub"])),
        memory_length=draw(0, 5),
        attention_span=draw(1, 5),
        cutoffs=(draw(1, V - 1),) if V > 1 and data.draw(st.booleans()) else (),
        div_val=draw(1, 2),
        dropout=data.draw(st.sampled_from([0.0, 0.5])),
        weight_norm=data.draw(st.booleans()),
        unrolled=2,
    ).to(dtype)
    memory, length = None, 0
    for _ in range(3):
        L = draw(1, 4)
        length = min(length + L, model.memory_length)
        h, memory = model(text(B, L, V), memory)
        nll = model.nll(h, text(B, L, V))
        assert (tuple(h.shape), h.dtype) == ((B, L, model.vocabulary.d_model), dtype)
        assert [tuple(x.shape[:2]) for x in memory] == [(B, length)] * 2
        assert (tuple(nll.shape), nll.dtype) == ((B, L), dtype)
        assert nll.isfinite().all()
        assert (nll >= 0).all()


# ------------------------------------------------------------------------------------------------------ differentiating


def test_the_implicit_gradient_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = transformer(d_model=4, num_heads=1, d_inner=3), text(1, 4)
    _, memory = model(text(1, 3))
    e = model.vocabulary.embed(tokens).detach().requires_grad_()

    def loss(e: Tensor) -> Tensor:
        monkeypatch.setattr(model.vocabulary, "embed", lambda tokens: e)
        return model.log_prob(tokens, memory)[0]

    assert torch.autograd.gradcheck(loss, e)


@every_equilibrium
def test_the_implicit_gradient_is_that_of_many_unrolled_steps(norm: str) -> None:
    grads = []
    for gradient in (ImplicitGradient(TIGHT), UnrolledGradient()):
        solver = TIGHT if isinstance(gradient, ImplicitGradient) else FixedPointIteration(tol=1e-13, max_steps=300)
        model = transformer(norm=norm, solver=solver, gradient=gradient, cutoffs=(4, 8), div_val=2)
        model.nll(model(text(2, 6))[0], text(2, 6)).mean().backward()
        assert model.deq.report is not None
        assert model.deq.report.converged.all()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-7, atol=1e-11)


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the penalty with respect to u, by finite differences; parameters have them too."""
    model = transformer(d_model=4, num_heads=1, d_inner=3)
    z, u, past = cell_inputs(model, 1, 3, 2)
    past = tuple(Past(*(x.detach() for x in parts)) for parts in past)
    probe = torch.randn(1, 12, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda like: probe)
    assert torch.autograd.gradcheck(lambda u: jacobian_penalty(model.cell, z, u, past), u.requires_grad_())
    jacobian_penalty(model.cell, *cell_inputs(model, 1, 3, 2)).sum().backward()
    block: Any = model.cell.blocks[0]
    for layer in (block.attention.qkv, block.attention.position, block.attention.output, block.feed_forward.inner):
        grad = layer.parametrizations.weight.original1.grad
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0


def test_training_reaches_every_parameter() -> None:
    for norm in ("post", "pre", "sub"):
        model = transformer(norm=norm, cutoffs=(4, 8), div_val=2, dropout=0.1, attention_dropout=0.1).train()
        _, memory = model(text(3, 8))
        h, _ = model(text(3, 8), memory)
        model.nll(h, text(3, 8)).mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("gradient", [PhantomGradient(steps=3), ImplicitGradient(TIGHT)], ids=str)
def test_recomputing_is_the_same(gradient: Any) -> None:
    """The masks of dropout too."""
    grads = []
    for recompute in (False, True):
        model = transformer(dropout=0.3, attention_dropout=0.3, recompute=recompute, gradient=gradient).train()
        torch.manual_seed(5)
        model.nll(model(text(2, 6))[0], text(2, 6)).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- solving


def test_samples_that_have_converged_leave() -> None:
    model, tokens = transformer(), text(4, 6)
    _, memory = model(text(4, 3))
    found = []
    for compact in (False, True):
        model.deq.solver = Anderson(tol=1e-12, max_steps=200, compact=compact)
        model.zero_grad()
        h, _ = model(tokens, memory)
        h.square().sum().backward()
        found.append((h.detach(), model.injection.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    report = model.deq.report
    assert report is not None
    assert report.row_evaluations < 4 * report.evaluations


def test_weights_are_computed_once_a_solve() -> None:
    calls: dict[str, int] = {}
    model = transformer()
    block: Any = model.cell.blocks[0]
    layers = {"qkv": block.attention.qkv, "position": block.attention.position, "inner": block.feed_forward.inner}
    for name, layer in layers.items():
        calls[name] = 0

        def count(*_: object, name: str = name) -> None:
            calls[name] += 1

        layer.parametrizations.weight[0].register_forward_hook(count)
    with torch.no_grad():
        model(text(2, 6))
    assert model.deq.report is not None
    assert model.deq.report.evaluations > 5
    assert calls["inner"] == 1
    assert calls["qkv"] == calls["position"] == 2  # keys, values and r are made before the solve


def test_a_start_saves_evaluations() -> None:
    model, tokens = transformer(), text(2, 6)
    with torch.no_grad():
        h, _ = model(tokens)
        again, _ = model(tokens, z0=h)
    assert model.deq.report is not None
    assert model.deq.report.evaluations == 1
    torch.testing.assert_close(again, h, rtol=0, atol=1e-10)


def test_unrolled() -> None:
    model, tokens = transformer(unrolled=3), text(2, 6)
    u = model.injection(model.vocabulary.embed(tokens))
    past = model.cell.past(zoo.Memory(u.new_zeros(2, 0, 8), u[:, :0]), 6)
    z = model.cell.initial_state(u, past)
    assert not z.any()
    for _ in range(3):
        z = model.cell(z, u, past)
    torch.testing.assert_close(model(tokens)[0], z, rtol=0, atol=1e-12)
    model.deq.unrolled = None
    assert not torch.allclose(model(tokens)[0], z, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- dropout


def masks_of(model: zoo.DEQTransformer, tokens: Tensor, memory: zoo.Memory) -> dict[str, Tensor]:
    """What each dropout multiplied by in one forward pass, NaN where its input was 0; the same at each evaluation."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, VariationalDropout):
            seen[name] = []

            def record(_: nn.Module, inputs: tuple[Tensor], out: Tensor, name: str = name) -> None:
                seen[name].append((out / inputs[0]).detach())

            hooks.append(module.register_forward_hook(record))
    model(tokens, memory)
    for hook in hooks:
        hook.remove()
    assert min(len(seen[name]) for name in seen if "blocks" in name) >= 3
    for masks in seen.values():
        for mask in masks[1:]:
            both = mask.isfinite() & masks[0].isfinite()
            torch.testing.assert_close(mask[both], masks[0][both])
    return {name: masks[0] for name, masks in seen.items()}


PLACES = {  # the shape of a mask, and over which dimensions one value is shared
    "input_dropout": ((4, 5, 8), (1,)),
    "deq.cell.position_dropout": ((1, 8, 8), (1,)),
    "deq.cell.blocks.0.attention.attention_dropout": ((4, 2, 5, 8), ()),
    "deq.cell.blocks.0.attention.dropout": ((4, 5, 8), (1,)),
    "deq.cell.blocks.0.feed_forward.inner_dropout": ((4, 5, 12), (1,)),
    "deq.cell.blocks.0.feed_forward.outer_dropout": ((4, 5, 8), (1,)),
    "output_dropout": ((4, 5, 8), (2,)),
}


def test_dropout_at_the_published_places() -> None:
    model = transformer(dropout=0.4, attention_dropout=0.2, unrolled=3).train()
    _, memory = model(text(4, 3))
    first, second = (masks_of(model, text(4, 5), memory) for _ in range(2))
    assert first.keys() == PLACES.keys()
    for name, (shape, shared) in PLACES.items():
        mask, p = first[name], 0.2 if name.endswith("attention_dropout") else 0.4
        assert tuple(mask.shape) == shape
        known = mask[mask.isfinite()]
        assert ((known == 0) | ((known - 1 / (1 - p)).abs() < 1e-9)).all()
        assert (known == 0).any()
        for dim in range(len(shape)):
            low, high = mask.nan_to_num(nan=9).amin(dim=dim), mask.nan_to_num(nan=-9).amax(dim=dim)
            one_value = bool((low >= high - 1e-9).all())
            assert one_value == (dim in shared or shape[dim] == 1), (name, dim)
        assert not torch.equal(mask.nan_to_num(), second[name].nan_to_num()), name


def test_evaluation_drops_nothing() -> None:
    model = transformer(dropout=0.4, attention_dropout=0.2)
    assert torch.equal(model(text(2, 6))[0], model(text(2, 6))[0])
    torch.testing.assert_close(model(text(2, 6))[0], transformer()(text(2, 6))[0], rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize(
    "changes",
    [{}, {"cutoffs": (4, 8), "div_val": 2}, {"memory_length": 4, "attention_span": 5}],
    ids=["plain", "clusters", "prompt longer than memory"],
)
def test_greedy_text_is_the_most_probable_at_each_step(changes: dict[str, Any]) -> None:
    model, prompt = transformer(**changes), text(3, 10)
    new = model.generate(prompt, length=5, temperature=0)
    assert isinstance(new, Tensor)
    assert torch.equal(new, model.generate(prompt, length=5, temperature=0))
    written = prompt
    for _ in range(5):
        continued = torch.stack([torch.cat([written, torch.full((3, 1), token)], dim=1) for token in range(11)])
        with torch.no_grad():
            last = torch.stack([model.log_prob(tokens)[0][:, -1] for tokens in continued])
        torch.testing.assert_close(last.exp().sum(dim=0), torch.ones(3, dtype=torch.float64))
        written = torch.cat([written, last.argmax(dim=0).unsqueeze(1)], dim=1)
    assert torch.equal(new, written[:, 10:])


def test_generating_goes_on_from_a_memory() -> None:
    model, tokens = transformer(), text(2, 9)
    _, memory = model(tokens[:, :5])
    whole, later = model.generate(tokens, 4, temperature=0), model.generate(tokens[:, 5:], 4, 0.0, memory=memory)
    assert isinstance(whole, Tensor)
    assert isinstance(later, Tensor)
    assert torch.equal(whole, later)


P = torch.tensor([0.1, 0.02, 0.4, 0.18, 0.3])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"temperature": 3.0}, P ** (1 / 3) / (P ** (1 / 3)).sum()),
        ({"temperature": 0}, torch.eye(5)[2]),
        ({"top_k": 1}, torch.eye(5)[2]),
        ({"top_k": 2}, torch.tensor([0, 0, 4 / 7, 0, 3 / 7])),
        ({"top_k": 9}, P),
        ({"top_p": 0.3}, torch.eye(5)[2]),
        ({"top_p": 0.5}, torch.tensor([0, 0, 4 / 7, 0, 3 / 7])),
        ({"top_p": 0.75}, torch.tensor([0, 0, 40, 18, 30]) / 88),
        ({"top_p": 1.0}, P),
        ({"top_k": 3, "top_p": 0.5}, torch.tensor([0, 0, 4 / 7, 0, 3 / 7])),
        ({"temperature": 0.5, "top_k": 2}, torch.tensor([0, 0, 16 / 25, 0, 9 / 25])),
    ],
    ids=str,
)
def test_what_is_drawn(arguments: dict[str, Any], expected: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.DEQTransformer(**{**SMALL, "vocab_size": 5}, unrolled=1).eval()
    monkeypatch.setattr(model.vocabulary, "log_probs", lambda h: P.log().expand(len(h), 5))
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(torch.zeros(10_000, 1, dtype=torch.int64), length=1, generator=generator, **arguments)
    assert isinstance(drawn, Tensor)
    frequencies = drawn.flatten().bincount(minlength=5) / 10_000
    assert (frequencies[expected == 0] == 0).all()
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.02)


def test_random_numbers_come_from_the_generator() -> None:
    model, prompt = transformer(), text(4, 3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, b, c = (model.generate(prompt, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(isinstance(x, Tensor) for x in (a, b, c))
    assert torch.equal(a, b)  # type: ignore[arg-type]
    assert not torch.equal(a, c)  # type: ignore[arg-type]
    d = model.generate(prompt, 8)
    torch.manual_seed(0)
    assert torch.equal(d, model.generate(prompt, 8))  # type: ignore[arg-type]


def test_texts_go_in_and_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(vocab_size=256)
    prompt = "né\n"
    tokens = torch.tensor([list(prompt.encode())])
    written = model.generate(tokens, 6, temperature=0)
    assert isinstance(written, Tensor)
    expected = bytes(written[0].tolist()).decode(errors="replace")
    assert model.generate(prompt, 6, temperature=0) == model.generate(prompt.encode(), 6, temperature=0) == expected
    always = torch.full((256,), -torch.inf).index_fill(0, torch.tensor([0xC3]), 0)
    monkeypatch.setattr(model.vocabulary, "log_probs", lambda h: always.expand(len(h), 256))
    assert model.generate("a", 2) == "\ufffd\ufffd"


@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "message"),
    [
        ("", {}, zoo.InputError, r"with L >= 1; given: torch.int64 of shape \(1, 0\)\. A text begins with one token"),
        (b"", {}, zoo.InputError, r"A text begins with one token at least, like '\\n'"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, zoo.InputError, r"A text begins with one token at least"),
        (torch.tensor([[256]]), {}, zoo.InputError, r"tokens are from 0 to 255 \(vocab_size=256\); given: from 256"),
        ("a", {"length": 0}, ValueError, r"generate\(length=\.\.\.\) takes an integer >= 1; given: 0"),
        ("a", {"temperature": -1}, ValueError, r"temperature=\.\.\.\) takes a finite number >= 0; given: -1"),
        (
            "a",
            {"temperature": float("nan")},
            ValueError,
            r"temperature=\.\.\.\) takes a finite number >= 0; given: nan",
        ),
        ("a", {"top_k": 0}, ValueError, r"top_k=\.\.\.\) takes an integer >= 1, or None; given: 0"),
        ("a", {"top_p": 0.0}, ValueError, r"top_p=\.\.\.\) takes a probability in \(0, 1\], or None; given: 0\.0"),
        ("a", {"top_p": 1.5}, ValueError, r"top_p=\.\.\.\) takes a probability in \(0, 1\], or None; given: 1\.5"),
    ],
)
def test_what_generate_refuses(prompt: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        transformer(vocab_size=256).generate(prompt, **{"length": 3, **arguments})


def test_a_text_for_a_model_of_words() -> None:
    with pytest.raises(zoo.InputError, match=r"has 11 tokens, which are not bytes: give it tokens, int64 \(B, L\), as"):
        transformer().generate("hello", 3)


def test_generating_needs_a_memory() -> None:
    with pytest.raises(ValueError, match=r"this model has memory_length=0; set model\.memory_length"):
        transformer(memory_length=0).generate(text(1, 3), 3)


# ------------------------------------------------------------------------------------------------------- making by name


def test_all_sizes_are_registered() -> None:
    names = ["deq_lm_wt103", "deq_transformer", "deq_transformer_nano", "deq_transformer_pre_wt103"]
    assert zoo.list_models(kind=zoo.DEQTransformer) == [*names, "deq_transformer_wt103"]
    with torch.device("meta"):
        models: dict[str, Any] = {name: zoo.create_model(name) for name in zoo.list_models(kind=zoo.DEQTransformer)}
    assert {name: len(model.cell.blocks) for name, model in models.items()} == {
        **dict.fromkeys(models, 1),
        "deq_lm_wt103": 3,
    }
    published = [models[name] for name in models if name.endswith("wt103")]
    assert {(model.vocab_size, model.memory_length) for model in published} == {(267_735, 150)}
    assert models["deq_transformer_nano"].vocab_size == 256


def test_where_training_starts() -> None:
    """As published: N(0, 0.01^2), biases at 0, and weight-normalised layers as torch starts them, with g = ||v||."""
    torch.manual_seed(0)
    model = zoo.create_model("deq_transformer")
    block = model.cell.blocks[0]
    for weight in (model.injection.weight, block.attention.content_bias, block.attention.position_bias):
        assert 0.008 < weight.std() < 0.012
    assert not model.injection.bias.any()
    for layer in (block.attention.qkv, block.attention.position, block.attention.output, block.feed_forward.inner):
        original = layer.parametrizations.weight
        torch.testing.assert_close(original.original0, torch.norm_except_dim(original.original1, 2, 0))
        bound = layer.in_features**-0.5
        assert 0.9 * bound < original.original1.abs().max() <= bound


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"vocab_size": 0}, ["DEQTransformer(vocab_size=...)", ">= 1", "0"]),
        ({"d_model": 7}, ["d_model", "even", "7"]),
        ({"num_heads": 3}, ["d_model=8", "num_heads=3", "d_head"]),
        ({"d_head": 0}, ["d_head", ">= 1", "0"]),
        ({"layers": 0}, ["layers", "0"]),
        ({"attention_span": 0}, ["attention_span", "0"]),
        ({"memory_length": -1}, ["memory_length", ">= 0", "-1"]),
        ({"cutoffs": (3, 2)}, ["cutoffs", "rising", "10", "(3, 2)"]),
        ({"cutoffs": (3, 11)}, ["cutoffs", "(3, 11)"]),
        ({"cutoffs": (2, 4), "div_val": 4}, ["3 clusters", "d_model=8", "div_val=4"]),
        ({"norm": "posst"}, ["unknown norm 'posst'", "post"]),
        ({"dropout": 2.0}, ["[0, 1]", "2.0"]),
        ({"unrolled": 0}, ["unrolled", "0"]),
    ],
    ids=str,
)
def test_sizes_that_make_no_sense(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        zoo.DEQTransformer(**{**SMALL, **changes})
    assert all(part in str(error.value) for part in parts), error.value


def test_the_cell_is_usable_by_itself() -> None:
    cell = transformer().cell
    assert isinstance(cell, TransformerCell)
    u = torch.zeros(2, 3, 24, dtype=torch.bfloat16)
    start = cell.initial_state(u, ())
    assert (tuple(start.shape), start.dtype) == ((2, 3, 8), torch.float64)

"""The DEQ transformer is the same function as the original: f, equilibria, memories, losses, gradients, as recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from tests.problems import flat
from tests.zoo.parity import meta, parity
from zoo.implicit import Anderson, Broyden, FixedPointIteration, ImplicitGradient, Solver, jacobian_penalty
from zoo.originals.transformer import original_names
from zoo.transformer import Past

NAME = "deq_transformer_postln"
TIGHT = {"tol": 1e-13, "max_steps": 60}
both_segments = pytest.mark.parametrize("segment", [0, 1])


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return parity(NAME)


def load(solver: Solver | None = None, **changes: Any) -> zoo.DEQTransformer:
    """The original's weights, in float64."""
    solver = FixedPointIteration(**TIGHT) if solver is None else solver
    model = zoo.load_original(
        parity(NAME, "state_dict"),
        memory_length=meta(NAME)["hyper"]["mem_len"],
        solver=solver,
        gradient=ImplicitGradient(solver),
        **changes,
    )
    assert isinstance(model, zoo.DEQTransformer)
    return model.double()


def tokens_of(data: dict[str, Tensor], segment: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a segment, batch first."""
    L = meta(NAME)["hyper"]["tgt_len"]
    whole = data["tokens"].T
    return whole[:, segment * L : (segment + 1) * L], whole[:, segment * L + 1 : (segment + 1) * L + 1]


def memory_before(data: dict[str, Tensor], segment: int) -> zoo.Memory | None:
    """What the original remembered before a segment."""
    return zoo.Memory(data["mem_z.0"].transpose(0, 1), data["mem_u.0"].transpose(0, 1)) if segment else None


def inputs_of(
    model: zoo.DEQTransformer, data: dict[str, Tensor], segment: int
) -> tuple[Tensor, Tensor, tuple[Past, ...]]:
    """z_in, u and what the cell needs of the memory."""
    z = data[f"z_in.{segment}"].double().mT.contiguous()
    u = model.injection(model.vocabulary.embed(tokens_of(data, segment)[0]))
    memory = memory_before(data, segment) or zoo.Memory(z[:, :0], u[:, :0])
    return z, u, model.cell.past(memory, z.shape[1])


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def test_sizes_are_read_off_the_shapes() -> None:
    hyper = meta(NAME)["hyper"]
    arguments = zoo.spec_of(load()).arguments
    assert zoo.spec_of(load()).model == "deq_transformer"
    assert (arguments["vocab_size"], arguments["cutoffs"]) == (hyper["n_token"], tuple(hyper["cutoffs"]))
    assert (arguments["num_heads"], arguments["d_inner"]) == (hyper["n_head"], hyper["d_inner"])
    assert (arguments["d_model"], arguments["div_val"]) == (hyper["d_model"], hyper["div_val"])


def test_embedding_and_injection(data: dict[str, Tensor]) -> None:
    model = load()
    assert apart(model.vocabulary.embed(tokens_of(data, 0)[0]), data["word_emb.0"]) <= 1e-12
    _, u, _ = inputs_of(model, data, 1)
    assert apart(torch.cat([data["mem_u.0"].transpose(0, 1), u], dim=1), data["u.1"].mT) <= 1e-12
    assert apart(zoo.transformer.sinusoids(12, 64, u), data["pos_emb.0"].mT) <= 1e-12


@both_segments
@pytest.mark.parametrize("fused", [False, True])
def test_the_cell_once(data: dict[str, Tensor], segment: int, fused: bool) -> None:
    """Attention is fused where nothing is differentiated."""
    model = load()
    with torch.set_grad_enabled(not fused):
        z, u, past = inputs_of(model, data, segment)
        assert apart(model.cell(z, u, past), data[f"f_out.{segment}"].mT) <= 1e-10


@pytest.mark.parametrize(
    "solver", [FixedPointIteration(**TIGHT), Anderson(**TIGHT), Broyden(**TIGHT)], ids=lambda s: type(s).__name__
)
def test_equilibria_memories_and_losses(data: dict[str, Tensor], solver: Solver) -> None:
    model, memory = load(solver), None
    with torch.no_grad():
        for segment in (0, 1):
            tokens, target = tokens_of(data, segment)
            h, memory = model(tokens, memory)
            assert apart(h, data[f"z_star.{segment}"].mT) <= 1e-9
            assert apart(memory.z, data[f"mem_z.{segment}"].transpose(0, 1)) <= 1e-9
            assert apart(memory.u, data[f"mem_u.{segment}"].transpose(0, 1)) <= 1e-9
            nll = model.nll(h, target)
            assert apart(nll, data[f"nll_per_token.{segment}"].T) <= 1e-9
            assert apart(grouped_by_cluster(nll, target), data[f"nll_original_order.{segment}"].flatten()) <= 1e-9
            assert nll.mean().item() == pytest.approx(meta(NAME)["results"][f"mean_nll.{segment}"], abs=1e-9)
            if segment == 0:
                log_p = model.vocabulary.log_probs(h[:, :4]).transpose(0, 1).flatten(0, 1)
                assert apart(log_p, data["logprob_first4"]) <= 1e-9


def grouped_by_cluster(nll: Tensor, target: Tensor) -> Tensor:
    """Losses as the original returns them: those of cluster 0 first, each cluster's in time-major order."""
    cutoffs = torch.tensor(meta(NAME)["hyper"]["cutoffs"])
    return nll.T.flatten()[torch.bucketize(target.T.flatten(), cutoffs, right=True).argsort(stable=True)]


def test_log_prob_of_the_whole_text(data: dict[str, Tensor]) -> None:
    """The losses of both segments are those of one text, read in one go or in two."""
    model = load()
    first, second = (data[f"nll_per_token.{segment}"].T for segment in (0, 1))
    text = data["tokens"].T
    with torch.no_grad():
        values, memory = model.log_prob(text[:, :12])
        assert apart(values[:, 1:], -first[:, :-1]) <= 1e-9
        more, _ = model.log_prob(text[:, 12:24], memory)
        assert apart(more, -torch.cat([first[:, -1:], second[:, :-1]], dim=1)) <= 1e-9


def test_all_gradients(data: dict[str, Tensor]) -> None:
    model = load()
    _, memory = model(tokens_of(data, 0)[0])
    tokens, target = tokens_of(data, 1)
    loss = model.nll(model(tokens, memory)[0], target).mean()
    assert loss.item() == pytest.approx(meta(NAME)["results"]["loss_seg1"], abs=1e-9)
    loss.backward()
    compared = set()
    for key, parameter in model.named_parameters():
        # The original has one parameter for tied words, and two of equal value for tied projections, which we add up.
        names = {f"grad.{name}" for name in original_names(key, numbered=False)} & data.keys()
        expected = sum(data[name].double() for name in names)
        assert isinstance(expected, Tensor)
        assert parameter.grad is not None
        difference = parameter.grad - expected.reshape(parameter.shape)
        assert difference.norm() <= 1e-5 * expected.norm(), key
        assert not compared & names
        compared |= names
    assert compared == {key for key in data if key.startswith("grad.")}


@pytest.mark.parametrize("hyper", ["n_layer", "eval_n_layer"])
def test_unrolled(data: dict[str, Tensor], hyper: str) -> None:
    """From 0, without memory."""
    model = load(unrolled=meta(NAME)["hyper"][hyper])
    tokens, target = tokens_of(data, 0)
    with torch.no_grad():
        assert apart(model.nll(model(tokens)[0], target), data[f"nll_unrolled_{hyper}"].T) <= 1e-9


def test_as_published(data: dict[str, Tensor]) -> None:
    """The published solver and number of steps, in float32. Where it stops differs in detail."""
    model = load(Anderson(tol=1e-3, max_steps=30)).float()
    tokens, target = tokens_of(data, 0)
    with torch.no_grad():
        nll = model.nll(model(tokens)[0], target)
    assert nll.dtype == torch.float32
    assert apart(nll, data["nll_default_f32_anderson30"].T) <= 2 * meta(NAME)["results"]["default_f32_vs_tight"]


def test_their_dropout_masks(data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    block: Any = model.cell.blocks[0]
    places = {
        "pos": (model.cell.position_dropout, data["drop.pos_mask"].mT),
        "att": (block.attention.attention_dropout, data["drop.att_mask"]),
        "attn_out": (block.attention.dropout, data["drop.attn_out_mask"].mT),
        "ff1": (block.feed_forward.inner_dropout, data["drop.ff1_mask"]),
        "ff2": (block.feed_forward.outer_dropout, data["drop.ff2_mask"]),
    }
    for dropout, mask in places.values():
        assert (mask == 0).any()
        monkeypatch.setattr(dropout, "forward", lambda x, mask=mask: x * mask)
    z, u, past = inputs_of(model, data, 1)
    found = model.cell(z, u, past)
    assert apart(found, data["drop.f_out"].mT) <= 1e-6
    assert apart(found, data["f_out.1"].mT) > 1e-3


def test_the_jacobian_penalty_with_their_probe(data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    _, u, past = inputs_of(model, data, 1)
    left = [data["jac.v0"].double().mT]
    monkeypatch.setattr(torch, "randn_like", lambda like: left.pop().reshape(like.shape))
    penalty = jacobian_penalty(model.cell, data["z_star.1"].mT, u, past)
    assert left == []
    assert penalty.mean().item() == pytest.approx(meta(NAME)["results"]["jac_loss"], rel=1e-9)


# Where the largest eigenvalues are a complex pair, power iteration converges to nothing. This is of a dense Jacobian.
RADIUS_OF_SAMPLE_0 = abs(0.4867 + 0.1432j)


def test_the_spectral_radius(data: dict[str, Tensor]) -> None:
    """Theirs is |v^T J v| after 150 power iterations from their start."""
    model = load()
    theirs = torch.tensor(meta(NAME)["results"]["sradius_150"], dtype=torch.float64)
    _, u, past = inputs_of(model, data, 1)
    z = data["z_star.1"].mT.contiguous().requires_grad_()
    fz = model.cell(z, u, past)
    v = data["jac.power_start"].double().mT
    for _ in range(150):
        before = v / flat(v).norm(dim=1)[:, None, None]
        (v,) = torch.autograd.grad(fz, z, before, retain_graph=True)
    torch.testing.assert_close(flat(before * v).sum(dim=1).abs(), theirs, rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(0)
    ours = zoo.implicit.spectral_radius(model.cell, z.detach(), u, past, products=60, generator=generator)
    expected = torch.cat([torch.tensor([RADIUS_OF_SAMPLE_0], dtype=torch.float64), theirs[1:]])
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=0)

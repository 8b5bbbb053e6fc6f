"""Freezing: what is left as it is, what trains on, and which mistakes are told."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from zoo.freezing import frozen_statistics
from zoo.implicit import Anderson, ImplicitGradient


def model() -> nn.Module:
    """With random weights, whose equilibrium is not reached."""
    torch.manual_seed(0)
    of = zoo.create_model(
        "mdeq_nano", dropout=0.0, solver=Anderson(max_steps=6), gradient=ImplicitGradient(Anderson(max_steps=6))
    )
    of.deq.on_failure = "ignore"
    return of.train()


def step(of: nn.Module) -> set[str]:
    """One step of training; the names of the parameters and buffers that it changed."""
    before = {key: value.clone() for key, value in of.state_dict().items()}
    parameters = [p for p in of.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    of(torch.rand(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    return {key for key, value in of.state_dict().items() if not torch.equal(value, before[key])}


def trainable(of: nn.Module) -> set[str]:
    return {name for name, p in of.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------ what is frozen


def test_what_is_frozen_does_not_move_and_all_else_does() -> None:
    frozen, free = model(), model()
    named = zoo.freeze(frozen, "stem.*", "head.widen.*")
    assert named == [name for name, _ in frozen.named_parameters() if name.startswith(("stem.", "head.widen."))]
    changed, would = step(frozen), step(free)
    assert changed == {key for key in would if not key.startswith(("stem.", "head.widen."))}
    assert {"stem.0.weight", "stem.1.running_mean", "head.widen.0.bn1.running_mean"} <= would
    assert {"deq.cell.post.0.1.parametrizations.weight.original1", "head.down.0.1.running_mean"} <= changed


def test_statistics_of_norms_without_parameters_are_frozen_by_their_place() -> None:
    """The bottlenecks of the head have such; whoever freezes the convolutions alone did not name them."""
    a, b = model(), model()
    zoo.freeze(a, "head.widen.*")
    zoo.freeze(b, "head.widen.*.conv?.weight")
    assert {name.rpartition(".")[0] for name in frozen_statistics(a)} >= {"head.widen.0", "head.widen.1"}
    assert not frozen_statistics(b)


def test_a_norm_half_of_which_is_frozen_keeps_gathering() -> None:
    of = model()
    zoo.freeze(of, "stem.*.weight")
    assert not frozen_statistics(of)
    zoo.freeze(of, "stem.*.bias")
    assert frozen_statistics(of) == ["stem.1", "stem.4"]


def test_frozen_norms_stay_in_eval_mode_whoever_calls_train() -> None:
    of = model()
    zoo.freeze(of, "stem.*")
    for _ in range(2):
        of.eval()
        of.train()
        of.stem.train(True)
        assert [m.training for m in of.stem if isinstance(m, nn.BatchNorm2d)] == [False, False]
        assert of.training
        assert of.head.final[1].training


def test_copies_are_frozen_apart_from_the_original() -> None:
    of = model()
    zoo.freeze(of, "stem.*")
    for other in (copy.deepcopy(of.stem), pickle.loads(pickle.dumps(of.stem))):  # noqa: S301 - its own
        other.train()
        assert frozen_statistics(other) == ["1", "4"]
        assert not other[1].training
        zoo.unfreeze(other, "*")
        assert other[1].training
    assert frozen_statistics(of) == ["stem.1", "stem.4"]


def test_all_statistics_of_a_model() -> None:
    of = model()
    zoo.freeze_statistics(of)
    of.train()
    assert not any(key.endswith(("running_mean", "running_var", "num_batches_tracked")) for key in step(of))
    assert trainable(of) == {name for name, _ in of.named_parameters()}


@given(st.lists(st.sampled_from(["stem.*", "deq.*", "head.*", "*.bias", "head.classifier.weight", "*"]), min_size=1))
def test_unfreezing_undoes_it(patterns: list[str]) -> None:
    of = SMALL
    named = zoo.freeze(of, *patterns)
    assert trainable(of) == ALL - set(named)
    assert zoo.unfreeze(of, *patterns) == named
    assert trainable(of) == ALL
    assert not frozen_statistics(of)
    assert all(m.training for m in of.modules())


SMALL = model()
ALL = trainable(SMALL)


# ------------------------------------------------------------------------------------------------------- equilibrium


def head_step(of: nn.Module) -> Tensor:
    x = torch.rand(4, 1, 8, 8)
    loss: Tensor = of(x).square().sum()
    loss.backward()
    return loss


def test_a_frozen_equilibrium_trains_the_head_without_an_adjoint_solve() -> None:
    of = model()
    head_step(of)
    assert of.deq.adjoint_report is not None
    of = model()
    zoo.freeze(of, "stem.*", "deq.*")
    head_step(of)
    assert of.deq.adjoint_report is None
    assert all((p.grad is not None) == name.startswith("head.") for name, p in of.named_parameters())


@pytest.mark.parametrize("frozen", ["stem.*", "deq.*"])
def test_half_of_what_comes_before_the_head_is_frozen(frozen: str) -> None:
    """Its gradients are gone, and all others are what they were."""
    a, b = model(), model()
    zoo.freeze(a, frozen)
    zoo.freeze_statistics(a)
    zoo.freeze_statistics(b)
    for of in (a, b):
        torch.manual_seed(1)
        head_step(of)
    assert a.deq.adjoint_report is not None
    theirs = dict(b.named_parameters())
    for name, p in a.named_parameters():
        if name.startswith(frozen[:-1]):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["stme.*"],
            r"no parameter of this MDEQ has a name like 'stme.\*'. Did you mean 'stem.\*'\? .*stem, deq, head",
        ),
        (["stem.*", "deq.cel.*"], r"like 'deq.cel.\*'. Did you mean 'deq.cell.\*'\?"),
        (["head"], r"like 'head'. Did you mean 'head.\*'\?"),
        ([], r"give patterns of the names of parameters of this MDEQ, like stem.\*"),
    ],
)
def test_a_pattern_that_matches_nothing_changes_nothing(patterns: list[str], message: str) -> None:
    for change in (zoo.freeze, zoo.unfreeze):
        with pytest.raises(ValueError, match=message):
            change(SMALL, *patterns)
    assert trainable(SMALL) == ALL


def test_patterns_are_given_one_by_one() -> None:
    with pytest.raises(TypeError, match=r"give patterns one by one, freeze\(model, \*patterns\); given: \['stem"):
        zoo.freeze(zoo.create_model("mdeq_nano"), ["stem.*"])  # type: ignore[arg-type]

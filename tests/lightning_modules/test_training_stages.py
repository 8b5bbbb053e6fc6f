"""The stages of training: unrolled steps, the penalty's schedules, the learning rate; and all of it resumed."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import lightning_modules.base
from lightning_modules import ImageClassifier
from lightning_modules.optimizers import Cosine, OneCycle, make_optimizer
from tests.command_line import same
from tests.lightning_modules.runs import Rates, Steps, batches, gradients, parameters, small, train, trained
from zoo.implicit import Anderson, ImplicitGradient, VariationalDropout
from zoo.implicit.dropout import current_draws

MDEQ: dict[str, Any] = {
    "model": "mdeq",
    "model_args": {
        "channels": (8, 8), "head_widths": (2, 2), "final_width": 8, "in_channels": 1, "expansion": 1, "dropout": 0.3
    },
}  # fmt: skip


def at_step(patch: pytest.MonkeyPatch, step: int, epoch: int = 0) -> None:
    """As if the run were there."""
    patch.setattr(pl.LightningModule, "global_step", step)
    patch.setattr(pl.LightningModule, "current_epoch", epoch)


# ---------------------------------------------------------------------------------------------- unrolled pre-training


def test_training_begins_unrolled_and_validation_always_solves() -> None:
    module, steps = small(pretrain_steps=3, pretrain_depth=2), Steps()
    run = train(module, logger=steps)
    assert [values["train/unrolled"] for values in steps.logged] == [1, 1, 1, 0]
    assert [values["train/steps"] for values in steps.logged[:3]] == [2, 2, 2]
    assert steps.logged[3]["train/steps"] != 2
    assert ["train/adjoint_steps" in values for values in steps.logged] == [False, False, False, True]
    assert run.callback_metrics["val/converged"] == 1
    assert run.callback_metrics["val/steps"] != 2
    assert module.model.deq.unrolled is None


def test_validation_solves_while_training_is_unrolled() -> None:
    module = small(pretrain_steps=100, pretrain_depth=1)
    run = train(module)
    assert run.callback_metrics["train/unrolled"] == 1
    assert run.callback_metrics["val/converged"] == 1
    assert run.callback_metrics["val/steps"] > 1


def test_nothing_is_said_where_nothing_is_unrolled() -> None:
    _, logged = trained()
    assert not any("train/unrolled" in values for values in logged)


def test_an_unrolled_step_is_that_of_the_explicit_network() -> None:
    (image, label), module = next(iter(batches())), small(pretrain_steps=1, pretrain_depth=3)
    found = gradients(module, (image, label))
    model = module.model
    x = model.injection((image.flatten(1) - model.mean) / model.std)
    z = torch.zeros_like(x)
    for _ in range(3):
        z = model.deq.cell(z, x)
    loss = F.cross_entropy(model.classifier(z), label)
    torch.testing.assert_close(found["loss"], loss.detach())
    for name, expected in zip(parameters(module), torch.autograd.grad(loss, list(module.parameters())), strict=True):
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pretrain_steps", [2, 6])
def test_a_resumed_run_knows_where_it_was(tmp_path: Path, pretrain_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight steps in one go, or four and four: the same stages, and penalties in the same steps."""
    made: list[int] = []
    penalty = lightning_modules.base.jacobian_penalty

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        made[-1] += 1
        return penalty(*args, **kwargs)

    monkeypatch.setattr(lightning_modules.base, "jacobian_penalty", watched)

    class Start(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            made.append(0)

    def run(**arguments: Any) -> tuple[pl.Trainer, list[float], list[int]]:
        made.clear()
        module = small(pretrain_steps=pretrain_steps, jacobian_weight=1.0, jacobian_frequency=0.5)
        torch.manual_seed(3)
        steps = Steps()
        done = train(module, Start(), logger=steps, **arguments)
        return done, [values["train/unrolled"] for values in steps.logged], list(made)

    _, unrolled, penalties = run(max_epochs=2)
    assert unrolled == [float(k < pretrain_steps) for k in range(8)]
    assert not any(penalties[:pretrain_steps])
    assert set(penalties[pretrain_steps:]) == {0, 1}
    half, unrolled_before, penalties_before = run()
    half.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    _, unrolled_after, penalties_after = run(max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert unrolled_before + unrolled_after == unrolled
    assert penalties_before + penalties_after == penalties


def test_a_model_that_is_unrolled_itself_stays_so() -> None:
    """The explicit baseline: never solved, before, during and after training."""
    module = small(pretrain_steps=1, pretrain_depth=2)
    module.model.deq.unrolled = 7
    steps = Steps()
    run = train(module, logger=steps)
    assert [values["train/steps"] for values in steps.logged] == [2, 7, 7, 7]
    assert run.callback_metrics["val/steps"] == 7
    assert module.model.deq.unrolled == 7


# ------------------------------------------------------------------------------------------- the penalty's schedules


@pytest.mark.parametrize(
    ("step", "epoch", "expected"),
    [
        (0, 0, 0.03),
        (509_999, 80, 0.03),
        (510_000, 80, 2.5),
        (559_999, 88, 2.5),
        (560_000, 88, 2.6),
        (659_999, 89, 2.7),
        (660_000, 89, 2.8),
        (660_000, 90, 0.0),
        (0, 90, 0.0),
    ],
)
def test_the_weight_of_the_penalty_over_a_published_run(step: int, epoch: int, expected: float) -> None:
    """MDEQ-small (reg.) on ImageNet, of Bai, Koltun and Kolter (ICML 2021), stopped at epoch 90 as that on CIFAR."""
    module = small(
        pretrain_steps=510_000, jacobian_pretrain_weight=0.03, jacobian_weight=2.5, jacobian_growth=0.1,
        jacobian_growth_interval=50_000, jacobian_end_epoch=90,
    )  # fmt: skip
    assert module.jacobian_weight_at(step, epoch) == pytest.approx(expected, abs=1e-12)


def test_the_defaults_are_no_schedule() -> None:
    module = small(jacobian_weight=0.5)
    assert {module.jacobian_weight_at(step, step // 100) for step in (0, 9_999, 10_000, 1_000_000)} == {0.5}


@pytest.mark.parametrize(("step", "weight"), [(0, 0.5), (2, 2.0), (5, 3.0)])
def test_the_loss_has_the_weight_of_its_step(step: int, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = next(iter(batches()))
    schedule = {
        "pretrain_steps": 2, "jacobian_pretrain_weight": 0.5, "jacobian_weight": 2.0, "jacobian_growth": 1.0,
        "jacobian_growth_interval": 3,
    }  # fmt: skip
    at_step(monkeypatch, step)
    logged: dict[str, Any] = {}
    module = small(**schedule, jacobian_probes=3)
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    loss = module.training_step(batch, 0).detach()
    assert logged["train/jacobian"] > 0
    torch.testing.assert_close(loss, logged["train/loss"] + weight * logged["train/jacobian"])


def test_more_probes_are_a_better_estimate() -> None:
    batch = next(iter(batches()))
    spread = []
    for probes in (1, 16):
        module = small(jacobian_weight=1.0, jacobian_probes=probes)
        spread.append(torch.stack([gradients(module, batch)["loss"] for _ in range(12)]).std())
    assert spread[1] < 0.5 * spread[0]


@settings(max_examples=6, deadline=None)
@given(k=st.integers(1, 5), seed=st.integers(0, 2**63 - 1))
def test_the_jitter_is_from_minus_k_to_k_less_one(k: int, seed: int) -> None:
    module = small(jacobian_weight=1.0, max_steps_jitter=k)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draws = [module.jacobian_draw_at(step) for step in range(60 * k)]
    assert {jitter for _, jitter in draws} == set(range(-k, k))
    assert all(wanted for wanted, _ in draws)


@pytest.mark.parametrize(("jitter", "expected"), [([-2, 0], {-2, -1, 0}), ([3, 3], {3}), (0, {0}), (1, {-1, 0})])
def test_a_jitter_from_low_to_high(jitter: int | list[int], expected: set[int]) -> None:
    """That of the published transformer is [-2, 0]."""
    module = small(jacobian_weight=1.0, max_steps_jitter=jitter)
    assert {module.jacobian_draw_at(step)[1] for step in range(60)} == expected
    assert module.hparams["max_steps_jitter"] == jitter


def test_only_steps_with_the_penalty_are_jittered(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = next(iter(batches()))
    module = small(
        solver=Anderson(tol=1e-12, max_steps=3), jacobian_weight=1.0, jacobian_frequency=0.5, max_steps_jitter=2
    )
    module.model.deq.on_failure = "ignore"
    torch.manual_seed(0)
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for step in range(40):
        at_step(monkeypatch, step)
        gradients(module, batch)
        assert module.model.deq.solver.max_steps == 3, "afterwards it is the model's own again"
        wanted, jitter = module.jacobian_draw_at(step)
        made = int(module.model.deq.report.steps.max())
        assert made == 3 + (jitter if wanted else 0)
        seen[wanted].add(made)
    assert seen == {True: {1, 2, 3, 4}, False: {3}}


def test_a_solve_keeps_one_step_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small(solver=Anderson(tol=1e-12, max_steps=2), jacobian_weight=1.0, max_steps_jitter=9)
    module.model.deq.on_failure = "ignore"
    monkeypatch.setattr(ImageClassifier, "jacobian_draw_at", lambda self, step: (True, -9))
    gradients(module, next(iter(batches())))
    assert module.model.deq.report.steps.max() == 1


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_penalty_is_taken_under_the_masks_of_the_solve(unrolled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = small(**MDEQ, pretrain_steps=int(unrolled), jacobian_weight=1.0, jacobian_pretrain_weight=1.0)
    module.model.deq.on_failure = "ignore"
    seen: list[Any] = []
    module.model.deq.cell.register_forward_hook(lambda *_: seen.append(current_draws()))
    made: list[int] = []
    penalty = lightning_modules.base.jacobian_penalty

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        made.append(len(seen))
        return penalty(*args, **kwargs)

    monkeypatch.setattr(lightning_modules.base, "jacobian_penalty", watched)
    assert any(isinstance(part, VariationalDropout) and part.p == 0.3 for part in module.modules())
    found = gradients(module, next(iter(batches())))
    assert all(value.isfinite().all() for value in found.values())
    (before,) = made
    assert 0 < before < len(seen)
    masks = [draws._kept for draws in seen]
    assert masks[0]
    assert all(kept is masks[0] for kept in masks)


def test_the_penalty_has_its_gradient_under_autocast() -> None:
    """Autocast keeps low-precision weights: those that a solve made without a graph are not for the penalty."""
    batch = next(iter(batches()))
    exact = Anderson(tol=5e-3)
    found = []
    for enabled in (False, True):
        module = small(jacobian_weight=30.0, solver=exact, gradient=ImplicitGradient(exact), model_args={"width": 6})
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(gradients(module, batch))
    name = "model.deq.cell.linear.weight"
    without = gradients(small(model_args={"width": 6}, solver=exact, gradient=ImplicitGradient(exact)), batch)
    assert (found[0][name] - without[name]).norm() > 5 * without[name].norm(), "it is the penalty's, mostly"
    assert (found[1][name] - found[0][name]).norm() < 0.03 * found[0][name].norm()


# ----------------------------------------------------------------------------------------------------- optimisation


@pytest.mark.parametrize(("lr", "min_lr"), [(0.02, 0.0), (0.02, 0.005), (0.02, 0.02)])
def test_the_cosine_ends_at_min_lr(lr: float, min_lr: float) -> None:
    rates = Rates()
    run = train(small(lr=lr, min_lr=min_lr), rates, max_epochs=2)
    expected = [min_lr + (lr - min_lr) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(9)]
    assert rates.rates == pytest.approx(expected[:8], abs=1e-12)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(min_lr, abs=1e-12)


@pytest.mark.parametrize(
    ("warmup", "min_lr", "expected"),
    [
        (0, 0.0, [0.02, 0.01 * (1 + math.cos(math.pi / 8)), 0.01 * (1 + math.cos(math.pi / 4))]),
        (1, 0.0, [0.0, 0.01 * (1 + math.cos(math.pi / 8)), 0.01 * (1 + math.cos(math.pi / 4))]),
        (4, 0.0, [0.0, 0.005, 0.01, 0.015, 0.01, 0.01 * (1 + math.cos(math.pi * 5 / 8))]),
        (2, 0.01, [0.0, 0.01, 0.01 + 0.005 * (1 + math.cos(math.pi / 4))]),
        (16, 0.0, [0.02 * k / 16 for k in range(8)]),
    ],
)
def test_the_cosine_counts_the_steps_of_the_warm_up(warmup: int, min_lr: float, expected: list[float]) -> None:
    rates = Rates()
    train(small(lr=0.02, min_lr=min_lr, warmup_steps=warmup), rates, max_epochs=2)
    assert rates.rates[: len(expected)] == pytest.approx(expected, abs=1e-15)
    without = [min_lr + (0.02 - min_lr) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert rates.rates[warmup:] == pytest.approx(without[warmup:], abs=1e-15)


def test_the_published_learning_rate_of_a_transformer() -> None:
    """Up to 2.5e-4 over 16000 of 300000 steps, and then down along the cosine."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2.5e-4)
    schedule = Cosine(optimizer, 300_000, warmup=16_000)
    for t, expected in {
        0: 0.0,
        8_000: 1.25e-4,
        15_999: 2.5e-4 * 15_999 / 16_000,
        16_000: 2.482495046338e-4,  # 2.5e-4 (1 + cos(0.16755...)) / 2
        150_000: 1.25e-4,
        300_000: 0.0,
    }.items():
        schedule.last_epoch = t
        assert schedule.get_lr() == pytest.approx([expected], rel=1e-10, abs=1e-18)


@pytest.mark.parametrize(("steps", "fraction"), [(8, 0.05), (8, 0.5), (19, 0.3), (200, 0.05), (2, 0.0), (1, 0.9)])
@pytest.mark.parametrize("lr", [4e-4, 1.0])
def test_one_cycle_is_torchs(steps: int, fraction: float, lr: float) -> None:
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr) for _ in range(2)]
    schedules = (
        torch.optim.lr_scheduler.OneCycleLR(
            optimizers[0], lr, total_steps=steps, pct_start=fraction, anneal_strategy="linear", cycle_momentum=False
        ),
        OneCycle(optimizers[1], steps, fraction),
    )
    for t in range(steps):
        theirs, ours = (optimizer.param_groups[0]["lr"] for optimizer in optimizers)
        assert ours == pytest.approx(theirs, rel=1e-10), f"step {t}"
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            if t < steps - 1:
                schedule.step()
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(lr / 250_000)
    schedules[1].step()
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(lr / 250_000), "and there it stays"


def test_one_cycle_whose_peak_is_its_first_step() -> None:
    """Which torch divides by zero for."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = OneCycle(optimizer, 20, 0.05)
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.step()
    schedule.step()
    assert 0.47 < optimizer.param_groups[0]["lr"] < 0.5


@pytest.mark.parametrize("margin", [0, 4])
def test_one_cycle_over_a_run_and_resumed(tmp_path: Path, margin: int) -> None:
    options = {"lr": 0.02, "schedule": "one_cycle", "warmup_fraction": 0.25, "schedule_margin": margin}
    whole, before, after, longer = Rates(), Rates(), Rates(), Rates()
    run = train(small(**options), whole, max_epochs=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    expected = OneCycle(optimizer, 8 + margin, 0.25)
    assert whole.rates == pytest.approx([expected.rate(0.02, t) for t in range(8)])
    end = run.optimizers[0].param_groups[0]["lr"]
    assert end == pytest.approx(expected.rate(0.02, 8))
    assert (end > 1e-3) is (margin > 0)
    train(small(**options), before, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    train(small(**options), after, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert after.rates == pytest.approx(whole.rates[4:])
    train(small(**options), longer, max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert longer.rates == pytest.approx([OneCycle(optimizer, 12 + margin, 0.25).rate(0.02, t) for t in range(4, 12)])


def test_a_constant_learning_rate_is_warmed_up_too() -> None:
    rates = Rates()
    train(small(lr=0.02, schedule="constant", warmup_steps=4), rates, max_epochs=2)
    assert rates.rates == pytest.approx([0.0, 0.005, 0.01, 0.015, 0.02, 0.02, 0.02, 0.02], abs=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_warm_up_is_resumed_within(tmp_path: Path, schedule: str) -> None:
    options = {"lr": 0.02, "schedule": schedule, "warmup_steps": 6}
    whole, before, after = Rates(), Rates(), Rates()
    train(small(**options), whole, max_epochs=2)
    train(small(**options), before, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    train(small(**options), after, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert before.rates + after.rates == whole.rates
    assert whole.rates[:7] == pytest.approx([0.02 * k / 6 for k in range(6)] + whole.rates[6:7], abs=1e-15)


@pytest.mark.parametrize("longer", [3, 4])
def test_a_resumed_run_that_is_longer_does_not_climb(tmp_path: Path, longer: int) -> None:
    """It goes on as one that was so long from the start, in its first step too."""
    train(small(lr=0.02), max_epochs=2).save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
    rates = Rates()
    run = train(small(lr=0.02), rates, max_epochs=longer, ckpt_path=tmp_path / "end.ckpt")
    expected = [0.01 * (1 + math.cos(math.pi * k / (4 * longer))) for k in range(8, 4 * longer)]
    assert rates.rates == pytest.approx(expected, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(rates.rates))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


class Save(pl.Callback):
    """A checkpoint at the end of the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path, weights_only=False)


def test_a_resumed_run_of_the_same_length_is_the_same_run(tmp_path: Path) -> None:
    whole, resumed, rates = small(lr=0.02), small(lr=0.02), Rates()
    train(whole, Save(tmp_path / "half.ckpt"), max_epochs=2)
    train(resumed, rates, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert rates.rates == pytest.approx([0.01 * (1 + math.cos(math.pi * k / 8)) for k in range(4, 8)], abs=1e-12)
    assert same(parameters(resumed), parameters(whole))


def test_checkpoints_of_torchs_own_cosine_can_be_resumed() -> None:
    """Those of runs before this class."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    old = torch.optim.SGD([parameter], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(old, T_max=10)
    for _ in range(4):
        old.step()
        theirs.step()
    new = torch.optim.SGD([parameter], lr=0.1)
    ours = Cosine(new, 10)
    new.load_state_dict(old.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for _ in range(6):
        assert new.param_groups[0]["lr"] == pytest.approx(old.param_groups[0]["lr"], abs=1e-12)
        for optimizer, scheduler in ((old, theirs), (new, ours)):
            optimizer.step()
            scheduler.step()
    assert new.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    ours.step()
    assert new.param_groups[0]["lr"] == 0, "and there it stays"


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_schedule_without_an_end_is_refused(schedule: str) -> None:
    message = f"schedule={schedule} takes the length of the run: give the trainer max_epochs or max_steps"
    with pytest.raises(lightning_modules.base.MisconfigurationException, match=message):
        train(small(schedule=schedule), max_epochs=-1, limit_train_batches=1)


def test_an_optimizer_by_name() -> None:
    module = small(optimizer="SGD", optimizer_args={"momentum": 0.9, "nesterov": True}, lr=0.1, weight_decay=0.01)
    run = train(module)
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["initial_lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (0.1, 0.01, 0.9, True)
    assert module.hparams["optimizer_args"] == {"momentum": 0.9, "nesterov": True}
    (default,) = train(small()).optimizers
    assert type(default) is torch.optim.AdamW


def test_optimizers_that_know_no_weight_decay() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    assert isinstance(make_optimizer("LBFGS", [parameter], 0.1, 0.0, {}), torch.optim.LBFGS)
    with pytest.raises(ValueError, match=r"LBFGS cannot be made with .*weight_decay=0.1.*unexpected keyword argument"):
        make_optimizer("LBFGS", [parameter], 0.1, 0.1, {})


# ------------------------------------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize("size", [3, 20])
def test_the_spectral_radius_is_that_of_a_few_rows(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a state that is a tuple, and of all inputs."""
    seen: list[Any] = []

    def watched(cell: Any, z: Any, *inputs: Any, **kwargs: Any) -> Tensor:
        seen.extend(pytree.tree_leaves((z, inputs)))
        return torch.zeros(len(z[0]))

    monkeypatch.setattr(lightning_modules.base, "spectral_radius", watched)
    module = small(**MDEQ).eval()
    module.model.deq.on_failure = "ignore"
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    image = torch.rand(size, 1, 8, 8)
    logits = module.observed("val", 0, image)
    assert logits.shape == (size, 10)
    rows = min(size, 4)
    assert [tuple(x.shape) for x in seen] == [(rows, 8, 8, 8), (rows, 8, 4, 4), (rows, 8, 8, 8)]


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrain_steps": -1}, "pretrain_steps takes an integer >= 0 and pretrain_depth one >= 1; given: -1 and 5"),
        ({"pretrain_depth": 0}, "pretrain_steps takes an integer >= 0 and pretrain_depth one >= 1; given: 0 and 0"),
        ({"pretrain_depth": 2.5}, "pretrain_depth one >= 1; given: 0 and 2.5"),
        ({"jacobian_probes": 0}, "jacobian_probes and jacobian_growth_interval take integers >= 1; given: 0 and 10000"),
        ({"jacobian_growth_interval": 0}, "take integers >= 1; given: 1 and 0"),
        ({"jacobian_growth": -0.1}, "jacobian_growth and jacobian_pretrain_weight take numbers >= 0; given: -0.1 and"),
        ({"jacobian_pretrain_weight": -1}, "take numbers >= 0; given: 0.0 and -1"),
        ({"jacobian_end_epoch": -1}, "jacobian_end_epoch takes an integer >= 0, or None; given: -1"),
        (
            {"max_steps_jitter": -1},
            r"max_steps_jitter takes an integer >= 0, or two integers \[low, high\] .*given: -1",
        ),
        ({"max_steps_jitter": [1, 0]}, r"with low <= high; given: \[1, 0\]"),
        ({"max_steps_jitter": [0]}, r"max_steps_jitter takes .*; given: \[0\]"),
        ({"max_steps_jitter": [0.0, 1]}, r"max_steps_jitter takes .*; given: \[0.0, 1\]"),
        ({"warmup_steps": -1}, "warmup_steps takes an integer >= 0; given: -1"),
        ({"warmup_steps": 2.5}, "warmup_steps takes an integer >= 0; given: 2.5"),
        ({"schedule": "one_cycle", "warmup_steps": 3}, "one_cycle' rises and ends by itself.*given: 3 and 0.0"),
        ({"schedule": "one_cycle", "min_lr": 1e-4}, "takes warmup_steps=0 and min_lr=0; given: 0 and 0.0001"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction takes a number in \[0, 1\); given: 1.0"),
        ({"schedule_margin": -1}, "schedule_margin and show_every take integers >= 0; given: -1 and 1"),
        ({"show_every": 0.5}, "schedule_margin and show_every take integers >= 0; given: 0 and 0.5"),
        ({"min_lr": 0.1}, "min_lr takes a number from 0 to lr; given: 0.1 and 0.001"),
        ({"optimizer": "AdmW"}, r"unknown optimizer 'AdmW'. Did you mean 'AdamW'\? Known: .*SGD"),
        (
            {"optimizer_args": {"momentun": 0.9}, "optimizer": "SGD"},
            "SGD has no argument 'momentun'. Did you mean 'mom",
        ),
        ({"optimizer_args": {"lr": 0.9}}, "lr is an argument of its own, beside optimizer_args"),
        ({"optimizer_args": {"momentum": -1.0}, "optimizer": "SGD"}, r"SGD cannot be made with .*momentum.*-1\.0"),
        ({"optimizer_args": {"betas": 3}}, r"AdamW cannot be made with .*'betas': 3"),
    ],
)
def test_mistakes_are_refused_where_they_are_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_an_argument_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'jacobain_weight'"):
        small(jacobain_weight=1.0)


def test_a_run_has_one_seed_though_a_hook_of_the_user_does_not_call_ours() -> None:
    """Of which each step's draws follow, the same on all processes; the steps change torch's own seed."""
    found = []

    class Mine(ImageClassifier):
        def on_train_start(self) -> None:
            """Not ours."""

        def on_train_batch_end(self, *args: Any) -> None:
            found.append(self.run_seed.value)

    module = Mine(model_args={"width": 6})
    torch.manual_seed(7)
    train(module)
    assert found == [7] * 4

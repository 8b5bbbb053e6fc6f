"""A step without a finite gradient leaves nothing behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.plugins import MixedPrecision

from lightning_modules import LanguageModel, SkippedSteps, TrainingError
from tests.command_line import same
from tests.lightning_modules import texts
from tests.lightning_modules.poison import (
    BATCHES,
    FAMILIES,
    INF,
    NAN,
    SIZE,
    PoisonedOutput,
    Watch,
    digits,
    fit,
    loader,
    multiscale,
    told_once,
    without,
    words,
)
from tests.lightning_modules.runs import Steps, parameters, small

pytestmark = pytest.mark.filterwarnings("ignore::zoo.implicit.report.ConvergenceWarning")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_skipped_step_leaves_nothing_behind(name: str, value: float) -> None:
    """Neither in the model, its buffers too, nor in the optimizer; the rest is as if it had not been there."""
    make, data = FAMILIES[name]
    bad = {0, 2, 3}
    module, watch, steps = make(schedule="constant"), Watch(), Steps()
    poison = PoisonedOutput(module, value, bad)
    if name == "transformer":
        module.model.register_forward_hook(poison.hook)
    with told_once() as told:
        run = fit(module, loader(data(), bad, value), watch, logger=steps)
    assert [same(a, b) for a, b in zip(watch.states, watch.states[1:], strict=False)] == [
        k in bad for k in range(BATCHES)
    ]
    assert [logged["train/skipped"] for logged in steps.logged] == [1, 1, 2, 3, 3, 3]
    assert run.global_step == BATCHES
    assert told[0].startswith("training step 0 was skipped, since it has no finite gradient: ")
    assert (f"batch[0], float32 of shape ({SIZE}, " in told[0]) == (name != "transformer")
    figures = {key: v for key, v in run.callback_metrics.items() if key not in ("train/loss", "train/residual")}
    assert all(v.isfinite() for v in figures.values()), figures

    other, others = make(schedule="constant"), Watch()
    if name != "transformer":  # whose memory went on with what was read
        fit(other, without(data(), bad), others)
        assert same(watch.states[-1], others.states[-1])


def test_all_that_was_accumulated_is_skipped() -> None:
    """Batch 3 is the second half of the second step, whose first half was good."""
    module, other, watch, others = (*(multiscale(schedule="constant") for _ in range(2)), Watch(), Watch())
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    with told_once() as told:
        run = fit(module, loader(digits(), {3}), watch, **options)
    assert "training step 1 was skipped" in told[0]
    assert run.callback_metrics["train/skipped"] == 1
    assert run.global_step == 3
    fit(other, without(digits(), {2, 3}), others, **options)
    assert same(watch.states[-1], others.states[-1])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_gradients(algorithm: str) -> None:
    module, other, watch, others = (*(multiscale(schedule="constant") for _ in range(2)), Watch(), Watch())
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    with told_once():
        fit(module, loader(digits(), {1}), watch, **options)
    fit(other, without(digits(), {1}), others, **options)
    assert same(watch.states[-1], others.states[-1])


def test_averages_stay_finite() -> None:
    module = multiscale()
    averages = EMAWeightAveraging(decay=0.9, use_buffers=True)
    with told_once():
        fit(module, loader(digits(), {0, 2}), averages)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert averages._average_model is not None
    assert all(value.isfinite().all() for value in averages._average_model.state_dict().values())


def test_a_memory_that_is_no_number_is_forgotten() -> None:
    """One that is, is kept."""
    module = texts.small()
    assert isinstance(module, LanguageModel)
    remembered: list[bool] = []

    class Memories(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            remembered.append("train" in module._memories)

    module.model.register_forward_hook(PoisonedOutput(module, NAN, {1}).hook)
    with told_once():
        fit(module, loader(words(), set()), Memories())
    assert remembered == [True, False, True, True, True, True]
    step = module.training_step
    module.training_step = lambda *args: NAN * step(*args)  # type: ignore[method-assign]
    with told_once():
        fit(module, loader(words(), set()), Memories())
    assert all(remembered[BATCHES:])


def test_a_loss_that_is_infinite_though_its_gradient_is_not() -> None:
    module, watch = small(), Watch()
    step = module.training_step
    module.training_step = lambda *args: step(*args) + (INF if args[1] == 2 else 0)  # type: ignore[method-assign]
    with told_once() as told:
        fit(module, loader(digits(), set()), watch)
    assert "since it has no finite gradient: the loss is infinite. Further" in told[0]
    assert same(watch.states[2], watch.states[3])


def test_a_gradient_that_is_large_is_finite() -> None:
    """The square of its norm is not."""
    module = small()
    step = module.training_step
    module.training_step = lambda *args: 1e30 * step(*args)  # type: ignore[method-assign]
    run = fit(module, loader(digits(), set()))
    assert run.callback_metrics["train/skipped"] == 0


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adadelta"])
def test_optimizers(optimizer: str) -> None:
    """None of them moves by what it remembers, or decays."""
    args = {"momentum": 0.9} if optimizer == "SGD" else {}
    module, watch = small(optimizer=optimizer, optimizer_args=args, weight_decay=0.1), Watch()
    with told_once():
        fit(module, loader(digits(), {2}), watch)
    assert [same(a, b) for a, b in zip(watch.states, watch.states[1:], strict=False)] == [
        k == 2 for k in range(BATCHES)
    ]


def test_with_a_scaler_an_overflow_is_no_trouble() -> None:
    """It is the scaler's: the scale falls. A batch that is no number leaves the scale as it is, and is counted."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module, steps, scales = small(), Steps(), []

    class Scales(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            scales.append(math.log2(scaler.get_scale()))

    with told_once() as told:
        fit(module, loader(digits(), {3}), Scales(), logger=steps, plugins=[plugin])
    assert scales[:4] == [120, 119, 118, 117]
    assert scales[4] == scales[3]
    assert scales[5] < scales[4]
    assert [logged["train/skipped"] for logged in steps.logged] == [0, 0, 0, 1, 1, 1]
    assert "batch[0], float32" in told[0]


def test_with_a_scaler_a_gradient_that_no_scale_mends_ends_the_run() -> None:
    """The loss is finite, and its gradient is not: the scale falls below 1, and then it is no overflow any more."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    module, callback = small(), SkippedSteps(max_consecutive=2)
    module.model.classifier.weight.register_hook(lambda gradient: gradient * NAN)
    with told_once(), pytest.raises(TrainingError, match="steps 3 to 4, as many in a row as max_consecutive=2"):
        fit(module, loader(digits(), set()), callback, plugins=[plugin])
    assert callback.skipped == 2


def test_an_optimizer_that_evaluates_the_loss_of_a_step_again() -> None:
    module = small(optimizer="LBFGS", schedule="constant", lr=0.1)
    before = parameters(module)
    fit(module, loader(digits(), set()))
    assert not same(before, parameters(module))

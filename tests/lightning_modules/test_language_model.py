"""LanguageModel: its figures by hand, the memory that it carries, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.trainer.states import TrainerStatus
from torch import Tensor
from torch.utils import _pytree as pytree

import zoo
from lightning_modules import LanguageModel, PredictionWriter
from tests.command_line import rows, said, same
from tests.lightning_modules.runs import Rates, Steps, gradients, parameters, trainer
from tests.lightning_modules.texts import SIZES, VOCAB, Texts, small, texts
from zoo.implicit import jacobian_penalty

BYTES = torch.arange(1.0, VOCAB + 1)
MODELS = ["deq_transformer", "stacked_transformer"]
# Text has no samples with indices, and a plain writer of predictions asks for them.
no_indices = pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices:UserWarning")


class Calls:
    """What the model was called with, and the memory that it gave back: those of training, those of validation."""

    def __init__(self, module: LanguageModel) -> None:
        self.training: list[tuple[Any, Any]] = []
        self.validation: list[tuple[Any, Any]] = []

        def keep(model: Any, inputs: Any, output: Any) -> None:
            (self.training if model.training else self.validation).append((inputs[1], output[1]))

        module.model.register_forward_hook(keep)


def fit(module: LanguageModel, *callbacks: Any, data: Texts | None = None, ckpt_path: Any = None, **args: Any) -> Any:
    run = trainer(*callbacks, **{"log_every_n_steps": 1, **args})
    run.fit(module, datamodule=texts() if data is None else data, ckpt_path=ckpt_path)
    return run


def by_hand(module: LanguageModel, loader: Any, memory_length: int) -> tuple[Tensor, Tensor]:
    """-log p of all targets in a row, and the targets, read segment by segment by a model that remembers so much."""
    model: Any = module.model
    own, model.memory_length = model.memory_length, memory_length
    memory, found, targets = None, [], []
    with torch.no_grad():
        for tokens, target in loader:
            h, memory = model(tokens, memory)
            found.append(model.nll(h, target))
            targets.append(target)
    model.memory_length = own
    return torch.cat(found, dim=1), torch.cat(targets, dim=1)


# ---------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("stage", "remembered"), [("val", None), ("test", 0), ("test", 30)])
def test_what_is_logged_is_counted_by_hand(model: str, stage: str, remembered: int | None) -> None:
    """Over all targets of a pass, whatever their number in a batch; those that do not count do not count."""
    data, module = texts(), small(model, eval_memory_length=remembered)
    run = trainer()
    (measured,) = getattr(run, "validate" if stage == "val" else "test")(module, datamodule=data, verbose=False)
    loader = data.val_dataloader() if stage == "val" else data.test_dataloader()
    nll, target = by_hand(module.eval(), loader, 6 if remembered is None else remembered)
    counts = target != -100
    assert 0 < counts.sum() < counts.numel()
    nats = nll.double().sum().item()
    figures = {
        "loss": nats / counts.sum().item(),
        "perplexity": math.exp(nats / counts.sum().item()),
        "bits_per_byte": nats / math.log(2) / BYTES[target[counts]].sum().item(),
    }
    assert {name: measured[f"{stage}/{name}"] for name in figures} == pytest.approx(figures, rel=1e-6)
    solver = {"steps", "residual", "converged", "spectral_radius"} if model == "deq_transformer" else set()
    assert set(measured) == {f"{stage}/{name}" for name in {*figures, *solver}}
    assert module.model.memory_length == 6


def test_more_memory_is_another_figure() -> None:
    """That the above agree is no accident."""
    found = [by_hand(small().eval(), texts().test_dataloader(), length)[0].sum().item() for length in (0, 6, 30)]
    assert len({round(value, 3) for value in found}) == 3


def test_each_pass_starts_without_memory() -> None:
    module, run, data = small(), trainer(), texts()
    first, second = (run.test(module, datamodule=data, verbose=False) for _ in range(2))
    assert first == second


def test_training_figures() -> None:
    """The loss of each step, and the others of the epoch."""
    data, module, steps = texts(), small(lr=0.0), Steps()
    run = fit(module, logger=steps, data=data)
    nll, target = by_hand(module.train(), data.train_dataloader(), 6)
    expected = [values.mean().item() for values in nll.split(5, dim=1)]
    assert [values["train/loss"] for values in steps.logged] == pytest.approx(expected, rel=1e-4)
    mean = nll.mean().item()
    assert run.callback_metrics["train/perplexity"].item() == pytest.approx(math.exp(mean), rel=1e-4)
    bits = nll.sum().item() / math.log(2) / BYTES[target].sum().item()
    assert run.callback_metrics["train/bits_per_byte"].item() == pytest.approx(bits, rel=1e-4)
    for values in steps.logged:
        assert {"train/steps", "train/residual", "train/converged", "train/adjoint_steps"} <= set(values)


def test_bits_a_token_where_the_data_know_no_bytes() -> None:
    data, module = texts(), small()
    (measured,) = trainer().validate(module, data.val_dataloader(), verbose=False)
    assert measured["val/bits_per_token"] == pytest.approx(measured["val/loss"] / math.log(2), rel=1e-6)
    assert "val/bits_per_byte" not in measured


def test_it_learns() -> None:
    """A text that repeats itself is certain in the end."""

    class Again(Texts):
        def load(self) -> Any:
            return type(super().load())(*(torch.arange(200) % VOCAB,) * 3)

    module = small(lr=0.03, jacobian_weight=0.02, warmup_steps=10)
    module.model.deq.on_failure = "ignore"
    run = fit(module, data=Again(batch_size=4, segment_length=5, eval_batch_size=4), max_epochs=5)
    assert run.callback_metrics["val/perplexity"] < 5, "of 11 words"
    assert run.callback_metrics["val/converged"] > 0.9


@no_indices
def test_predictions_are_rows(tmp_path: Path) -> None:
    """One for each stream in each segment, but for streams that have ended."""
    data, module = texts(), small(eval_memory_length=30)
    run = trainer(PredictionWriter(), default_root_dir=tmp_path)
    predicted = run.predict(module, datamodule=data)
    nll, target = by_hand(module.eval(), data.test_dataloader(), 30)
    pieces = list(zip(nll.split(5, dim=1), target.split(5, dim=1), strict=True))
    assert len(predicted) == len(pieces) == 5
    for found, piece in zip(predicted, pieces, strict=True):
        going_on = (piece[1] != -100).any(dim=1)
        values, targets = (x[going_on] for x in piece)
        counts = targets != -100
        assert found["tokens"].tolist() == counts.sum(1).tolist()
        torch.testing.assert_close(found["log_prob"], -values.double().sum(1), rtol=1e-6, atol=0)
        num_bytes = (BYTES[targets.where(counts, 0)] * counts).sum(1)
        bits = values.double().sum(1) / math.log(2) / num_bytes
        torch.testing.assert_close(found["bits_per_byte"], bits, rtol=1e-6, atol=0)
    table = rows(tmp_path / "predictions.csv")
    assert list(table[0]) == ["index", "tokens", "log_prob", "bits_per_byte"]
    assert [row["index"] for row in table] == [str(i) for i in range(14)]
    assert sum(int(row["tokens"]) for row in table) == 62


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("accumulated", [1, 3])
def test_memory_goes_from_batch_to_batch_and_from_epoch_to_epoch(accumulated: int) -> None:
    """Validation, before the first epoch and after each, has its own, empty at the beginning of each pass."""
    module = small()
    calls = Calls(module)
    fit(module, max_epochs=2, accumulate_grad_batches=accumulated, num_sanity_val_steps=2)
    assert len(calls.training) == 2 * 4
    assert calls.training[0][0] is None
    for (_, before), (given, _) in zip(calls.training, calls.training[1:], strict=False):
        assert same(tuple(given), tuple(before))
        assert not any(x.requires_grad for x in given)
    firsts = {0, 2, 2 + 4}  # two batches of the sanity check, then four of each pass
    assert {k for k, (given, _) in enumerate(calls.validation) if given is None} == firsts
    assert len(calls.validation) == 2 + 4 + 4


def test_sanity_checking_disturbs_nothing() -> None:
    modules = []
    for steps in (0, 2):
        modules.append(small())
        pl.seed_everything(0)
        fit(modules[-1], num_sanity_val_steps=steps, max_epochs=2)
    assert same(parameters(modules[0]), parameters(modules[1]))


def test_other_texts_start_without_memory() -> None:
    module = small()
    calls = Calls(module)
    tokens = torch.arange(40).view(4, 10) % VOCAB
    for B in (4, 4, 2, 2, 4):
        gradients(module, (tokens[:B], tokens[:B]))
    given = [None if memory is None else len(memory.z) for memory, _ in calls.training]
    assert given == [None, 4, None, 2, None]


def test_a_new_fit_is_of_another_text() -> None:
    module = small(lr=1e-3)
    calls = Calls(module)
    fit(module)
    fit(module)
    assert [memory is None for memory, _ in calls.training] == [True, False, False, False] * 2


class Save(pl.Callback):
    """A checkpoint at the end of the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path, weights_only=False)


@pytest.mark.parametrize("model", MODELS)
def test_a_resumed_run_goes_on_with_its_memory(model: str, tmp_path: Path) -> None:
    """It is the run that never stopped, bit by bit."""
    path = tmp_path / "half.ckpt"
    whole, resumed = small(model), small(model)
    calls = Calls(whole)
    fit(whole, Save(path), max_epochs=2)
    content = torch.load(path, weights_only=True)
    (_, memory) = calls.training[3]
    assert same(content["deq_zoo_memory"], pytree.tree_leaves(memory))
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in content["deq_zoo_memory"])
    calls = Calls(resumed)
    with said() as messages:
        fit(resumed, max_epochs=2, ckpt_path=path)
    assert not any("without memory" in message for message in messages)
    assert len(calls.training) == 1 + 4, "the first one shows what a memory is like"
    assert same(calls.training[1][0], memory)
    assert same(parameters(resumed), parameters(whole))


def test_a_run_that_is_resumed_and_has_nothing_to_do_keeps_its_memory(tmp_path: Path) -> None:
    first, again = tmp_path / "first.ckpt", tmp_path / "again.ckpt"
    fit(small()).save_checkpoint(first)
    fit(small(), ckpt_path=first).save_checkpoint(again)
    memories = [torch.load(path, weights_only=True)["deq_zoo_memory"] for path in (first, again)]
    assert same(*memories)
    assert [tuple(x.shape) for x in memories[0]] == [(4, 6, 8), (4, 6, 24)]


def test_taking_up_a_memory_draws_no_random_numbers() -> None:
    module = small(sizes={"dropout": 0.5}).train()
    state = torch.get_rng_state()
    module._take_up([torch.zeros(3, 6, 8), torch.zeros(3, 6, 24)], torch.zeros(3, 5, dtype=torch.int64))
    assert same(torch.get_rng_state(), state)
    assert isinstance(module._memories["train"], zoo.Memory)
    assert module.model.deq.unrolled is None


def test_a_memory_of_other_texts_is_not_taken_up(tmp_path: Path) -> None:
    """That of a run with another batch_size; and there is none in a checkpoint that one of several processes left."""
    fit(small()).save_checkpoint(tmp_path / "four.ckpt")
    content = torch.load(tmp_path / "four.ckpt", weights_only=True)
    torch.save({key: value for key, value in content.items() if key != "deq_zoo_memory"}, tmp_path / "none.ckpt")
    for name, data, expected in (
        ("four", texts(batch_size=3), "the checkpoint's is of batches of 4 rows a process, and now they have 3"),
        ("none", texts(), "this checkpoint has none"),
    ):
        module = small()
        calls = Calls(module)
        with said() as messages:
            fit(module, data=data, max_epochs=2, ckpt_path=tmp_path / f"{name}.ckpt")
        assert sum("without memory" in message and expected in message for message in messages) == 1
        assert [memory is None for memory, _ in calls.training] == [True, *[False] * (len(calls.training) - 1)]


@pytest.mark.parametrize(("processes", "rows"), [(1, [0, 1, 2, 3]), (2, [2, 3]), (4, [1]), (3, None)])
def test_each_process_takes_up_the_memory_of_its_rows(
    processes: int, rows: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = small()
    run = fit(module)
    monkeypatch.setattr(type(run), "world_size", processes)
    monkeypatch.setattr(type(run), "global_rank", min(1, processes - 1))
    whole = [torch.rand(4, 6, 8), torch.rand(4, 6, 24)]
    module._restored = None
    with said() as messages:
        module.on_load_checkpoint({"deq_zoo_memory": whole})
    if rows is None:
        assert module._restored is None
        assert any(message.endswith("is of 4 rows, which 3 processes cannot share") for message in messages)
    else:
        assert same(module._restored, [x[rows] for x in whole])
        assert not messages


def test_a_process_that_failed_alone_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective would wait for ever, or fail here, where there is no process group."""
    module = small()
    run = fit(module)
    monkeypatch.setattr(type(run), "world_size", 2)
    run.state.status = TrainerStatus.INTERRUPTED
    content: dict[str, Any] = {}
    with said() as messages:
        module.on_save_checkpoint(content)
    assert "deq_zoo_memory" not in content
    assert messages == ["The checkpoint has no memory of the text before: the other processes may have ended"]


def test_a_checkpoint_is_tested_without_its_memory(tmp_path: Path) -> None:
    run = fit(small())
    run.save_checkpoint(tmp_path / "a.ckpt")
    (measured,) = run.test(datamodule=texts(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    again = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    (found,) = trainer().test(again, datamodule=texts(), verbose=False)
    assert found == measured
    assert again._restored is None
    assert (again.vocab_size, again.eval_memory_length) == (VOCAB, None)
    assert dict(again.hparams)["model_args"] == SIZES


# ------------------------------------------------------------------------------------------------- stages of training


def test_the_jacobian_term_is_the_penalty_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small(jacobian_weight=3.0)
    batches = list(texts().train_dataloader())
    gradients(module, batches[0])
    before = module._memories["train"]
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    torch.manual_seed(5)
    loss = module.training_step(batches[1], 1).detach()
    calls: list[Any] = []
    module.model.deq.register_forward_hook(lambda deq, inputs, output: calls.append((output[0], inputs)))
    with torch.no_grad():
        module.model(batches[1][0], before)
    ((z, inputs),) = calls
    torch.manual_seed(5)
    penalty = jacobian_penalty(module.model.deq.cell, z, *inputs).mean().detach()
    torch.testing.assert_close(logged["train/jacobian"], penalty, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss, logged["train/loss"] + 3 * logged["train/jacobian"])


def test_pre_training_is_unrolled_and_warmed_up() -> None:
    module, steps, rates = (
        small(pretrain_steps=2, pretrain_depth=2, warmup_steps=4, jacobian_weight=0.1),
        Steps(),
        Rates(),
    )
    run = fit(module, rates, logger=steps)
    assert [values["train/unrolled"] for values in steps.logged] == [1, 1, 0, 0]
    assert ["train/jacobian" in values for values in steps.logged] == [False, False, True, True]
    assert [values["train/steps"] for values in steps.logged[:2]] == [2, 2]
    assert rates.rates == pytest.approx([0.0, 0.0025, 0.005, 0.0075], abs=1e-15)
    assert run.callback_metrics["val/steps"] > 2


def test_the_spectral_radius_is_that_of_a_few_rows() -> None:
    tokens = torch.arange(60).view(6, 10) % VOCAB
    module = small().eval()
    found = []
    for rows_ in (6, 4):
        module.log = lambda name, value, **_: found.append((name, value.item()))  # type: ignore[method-assign]
        module.observed("val", 0, tokens[:rows_], None)
    assert [name for name, _ in found] == ["val/spectral_radius"] * 2
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)
    assert 0 < found[0][1] < 1


def test_under_autocast_the_memory_is_as_the_model_returned_it() -> None:
    module = small(solver=None, gradient=None)
    module.model.deq.on_failure = "ignore"
    calls = Calls(module)
    fit(module, precision="bf16-mixed")
    for (_, before), (given, _) in zip(calls.training, calls.training[1:], strict=False):
        assert same(tuple(given), tuple(before))


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_memory_length": -1}, "eval_memory_length takes an integer >= 0, or None; given: -1"),
        ({"eval_memory_length": 2.5}, "eval_memory_length takes an integer >= 0, or None; given: 2.5"),
        ({"model_args": {"vocab_size": 3}}, "vocab_size is an argument of its own, beside model_args"),
        (
            {"model_args": {"d_modl": 3}},
            r"model 'deq_transformer_nano' has no argument 'd_modl'. Did you mean 'd_model'",
        ),
        ({"model": "deq_transformr"}, r"unknown model 'deq_transformr'. Did you mean 'deq_transformer'\?"),
        ({"model": "tanh_deq"}, "'tanh_deq' is no language model; these are: deq_lm_wt103, deq_transformer, "),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_mistakes_are_refused_where_they_are_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(**arguments)


TOKENS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize(
    ("tokens", "target", "message"),
    [
        (TOKENS, TOKENS + 2, r"targets are from 0 to 10, or ignore_index=-100; given: from 2 to 11"),
        (TOKENS, TOKENS - 1, "targets are from 0 to 10, or ignore_index=-100; given: from -1 to 8"),
        (
            TOKENS,
            TOKENS[:, 1:],
            r"targets are int64, one a token, here of shape \(2, 5\); given: torch.int64 of .* 4\)",
        ),
        (TOKENS, TOKENS.float(), "targets are int64, one a token.*given: torch.float32"),
        (TOKENS + 2, TOKENS, r"tokens are from 0 to 10 \(vocab_size=11\); given: from 2 to 11"),
        (TOKENS.int(), TOKENS, r"takes tokens int64 \(B, L\) with L >= 1; given: torch.int32"),
        (TOKENS[0], TOKENS[0], r"takes tokens int64 \(B, L\) with L >= 1; given: torch.int64 of shape \(5,\)"),
        (TOKENS.sum(), TOKENS.sum() % 2, r"takes tokens int64 \(B, L\) with L >= 1; given: torch.int64 of shape \(\)"),
    ],
)
def test_batches_that_are_none(tokens: Tensor, target: Tensor, message: str) -> None:
    module = small()
    for step in (module.training_step, module.validation_step, module.test_step, module.predict_step):
        with pytest.raises(zoo.InputError, match=message):
            step((tokens, target), 1)


def test_a_batch_in_which_nothing_counts() -> None:
    found = gradients(small(), (TOKENS, torch.full_like(TOKENS, -100)))
    assert all(value.eq(0).all() for value in found.values())


def test_data_of_another_vocabulary() -> None:
    module = LanguageModel("deq_transformer", 12, SIZES)
    with pytest.raises(MisconfigurationException, match=r"have vocab_size=11, and the model was asked for 12: give it"):
        fit(module)


def test_token_bytes_of_another_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Texts, "token_bytes", torch.ones(3))
    with pytest.raises(MisconfigurationException, match=r"one number a token, shape \(11,\); given: shape \(3,\)"):
        fit(small())

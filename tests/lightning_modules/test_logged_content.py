"""What every run gives its loggers: learning rate and throughput, samples with predictions, how solves converged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import SemanticSegmenter, samples, training_figures
from lightning_modules.drawing import RIGHT, WRONG, palette, pixels, sized
from lightning_modules.pictures import log_text
from tests.command_line import rows, same
from tests.lightning_modules import flows, texts
from tests.lightning_modules.runs import Rates, Steps, batches, small, train, trainer
from zoo.implicit import DEQ, Anderson

# From Python 3.12 a fork of a process with threads is warned of; Lightning's ddp_fork is such a fork.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

# ---------------------------------------------------------------------------------------------------- figures of steps


def test_the_learning_rate_is_that_of_the_step() -> None:
    steps, rates = Steps(), Rates()
    train(small(schedule="one_cycle", lr=0.1, warmup_fraction=0.5, show_every=0), rates, logger=steps)
    assert [logged["train/lr"] for logged in steps.logged] == rates.rates
    assert len(set(rates.rates)) == 4, "each step has another"


def test_each_group_of_parameters_has_its_rate() -> None:
    module, steps = small(), Steps()
    first, *others = module.parameters()
    groups = [{"params": [first], "lr": 0.25}, {"params": others, "lr": torch.tensor(0.5)}]
    module.configure_optimizers = lambda: torch.optim.SGD(groups, lr=1.0)  # type: ignore[method-assign]
    train(module, logger=steps)
    assert {(logged["train/lr"], logged["train/lr_1"]) for logged in steps.logged} == {(0.25, 0.5)}


class Clock(pl.Callback):
    """A clock of which 2 seconds are a batch of training, and 100 one of validation; and what the solves took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.evaluations: list[int] = []
        monkeypatch.setattr(training_figures, "perf_counter", lambda: self.now)

    def on_train_batch_start(self, *args: Any) -> None:
        self.now += 2

    def on_validation_batch_start(self, *args: Any) -> None:
        self.now += 100

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        (deq,) = module.equilibria().values()
        adjoint = 0 if deq.adjoint_report is None else deq.adjoint_report.evaluations
        self.evaluations.append(deq.report.evaluations + adjoint)


def speeds(steps: Steps) -> list[tuple[float, float]]:
    return [(logged["train/samples_per_second"], logged["train/evaluations_per_second"]) for logged in steps.logged]


def test_throughput_is_that_since_the_last_logged_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation in the middle and at the end of an epoch is left out, and so is the sanity check."""
    clock, steps = Clock(monkeypatch), Steps()
    options = {"val_check_interval": 1, "num_sanity_val_steps": 1, "log_every_n_steps": 2, "max_epochs": 2}
    train(small(show_every=0), clock, logger=steps, **options)
    per_second = [sum(clock.evaluations[i : i + 2]) / 4 for i in (0, 2, 4, 6)]
    assert speeds(steps) == [(10.0, pytest.approx(each)) for each in per_second]


def test_throughput_counts_all_batches_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, steps = Clock(monkeypatch), Steps()
    train(small(show_every=0), clock, logger=steps, accumulate_grad_batches=2)
    assert speeds(steps) == [(10.0, pytest.approx(sum(clock.evaluations[i : i + 2]) / 4)) for i in (0, 2)]


def test_throughput_of_a_resumed_run_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first window, of two steps here, knows nothing of the steps before."""
    run = train(small(schedule="constant", show_every=0), loader=batches(6))
    run.save_checkpoint(tmp_path / "run.ckpt")
    clock, steps = Clock(monkeypatch), Steps()
    options = {"max_epochs": 2, "log_every_n_steps": 4, "ckpt_path": tmp_path / "run.ckpt"}
    train(small(schedule="constant", show_every=0), clock, loader=batches(6), logger=steps, **options)
    assert speeds(steps) == [
        (10.0, pytest.approx(sum(clock.evaluations[:2]) / 4)),
        (10.0, pytest.approx(sum(clock.evaluations[2:]) / 8)),
    ]


def test_unrolled_steps_count_their_applications(monkeypatch: pytest.MonkeyPatch) -> None:
    _, steps = Clock(monkeypatch), Steps()
    clock = Clock(monkeypatch)
    train(small(pretrain_steps=4, pretrain_depth=3, show_every=0), clock, logger=steps)
    assert {found for _, found in speeds(steps)} == {(3 + 1) / 2}, "and the one that tells the residual"


def test_a_solve_counts_once() -> None:
    """The adjoint report of the step before is still there where a step has no backward pass."""
    module, images = small(), torch.rand(2, 1, 8, 8)
    module(images).sum().backward()  # before the run, of which it is no part
    deq = module.model.deq
    throughput, run = training_figures.Throughput(), trainer()
    throughput.on_train_start(run, module)
    assert throughput._new_evaluations() == 0
    module(images)
    assert throughput._new_evaluations() == deq.report.evaluations
    module(images).sum().backward()
    assert throughput._new_evaluations() == deq.report.evaluations + deq.adjoint_report.evaluations
    assert throughput._new_evaluations() == 0


def test_a_model_without_equilibrium_has_no_evaluations() -> None:
    steps = Steps()
    train(small(model="resnet", model_args={"in_channels": 1, "widths": [2]}), logger=steps)
    assert {"train/lr", "train/samples_per_second"} <= steps.logged[0].keys()
    assert "train/evaluations_per_second" not in steps.logged[0]


# ------------------------------------------------------------------------------------------------ pictures of all tasks


def classes() -> tuple[pl.LightningModule, Any]:
    return small(), batches()


def maps() -> tuple[pl.LightningModule, Any]:
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    module = SemanticSegmenter("mdeq_nano_scenes", 11, solver=Anderson(max_steps=2))
    module.model.deq.on_failure = "ignore"
    labels = torch.arange(64).view(1, 8, 8).expand(8, 8, 8) % 11
    labels = labels.where(labels != 3, 255)
    return module, DataLoader(TensorDataset(images, labels), batch_size=2)


def flow() -> tuple[pl.LightningModule, Any]:
    return flows.small(), DataLoader(flows.pairs(4), batch_size=1)


def words() -> tuple[pl.LightningModule, Any]:
    return texts.small(), texts.texts().train_dataloader()


TASKS: list[tuple[Callable[[], tuple[pl.LightningModule, Any]], str]] = [
    (classes, "pictures/val_samples_{}.png"),
    (maps, "pictures/val_samples_{}.png"),
    (flow, "pictures/val_flow_{}.png"),
    (words, "samples/val_samples_{}.txt"),
]


def shown(folder: Path) -> set[str]:
    """The files that are there besides the table."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in {".png", ".txt"}}


@pytest.mark.parametrize(("task", "name"), TASKS)
def test_each_validation_shows_its_samples(
    tmp_path: Path, task: Callable[[], tuple[pl.LightningModule, Any]], name: str
) -> None:
    """Once each, at the number of steps that were made; the sanity check does not."""
    module, loader = task()
    log = CSVLogger(tmp_path, name="", version="run")
    run = train(module, loader=loader, logger=log, max_epochs=2, num_sanity_val_steps=1)
    middle, end = f"{run.global_step // 2:06d}", f"{run.global_step:06d}"
    expected = {each.format(step) for step in (middle, end) for each in (name, "pictures/val_convergence_{}.png")}
    assert shown(tmp_path / "run") == expected
    for path in (tmp_path / "run" / "pictures").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 150
            assert len(np.unique(np.asarray(picture))) > 4, "something is drawn"


@pytest.mark.parametrize(("task", "name"), TASKS)
def test_showing_changes_nothing(task: Callable[[], tuple[pl.LightningModule, Any]], name: str, tmp_path: Path) -> None:
    """No figure, no report, no random number."""
    found = []
    for show_every in (0, 1):
        torch.manual_seed(0)
        module, loader = task()
        module.show_every = show_every
        run = trainer(logger=CSVLogger(tmp_path, name="", version=str(show_every)), limit_val_batches=1)
        measured = run.validate(module, loader, verbose=False)
        reports = [vars(m.report) for m in module.modules() if isinstance(m, DEQ)]
        found.append((measured, reports, torch.get_rng_state(), module.model.training))
    assert same(found[0], found[1])
    assert not shown(tmp_path / "0")
    assert shown(tmp_path / "1") == {name.format("000000"), "pictures/val_convergence_000000.png"}


def test_so_many_validations_one_is_shown(tmp_path: Path) -> None:
    train(small(show_every=2), logger=CSVLogger(tmp_path, name="", version="run"), max_epochs=5)
    steps = {int(name[-10:-4]) for name in shown(tmp_path)}
    assert steps == {4, 8, 16}, "the first, the second and the fourth"


@pytest.mark.parametrize("arguments", [{"logger": False}, {"logger": CSVLogger("."), "fast_dev_run": True}])
def test_without_a_logger_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(samples, "show", lambda *args: pytest.fail("nobody sees it"))
    train(small(), default_root_dir=tmp_path, **arguments)


def test_a_test_shows_nothing(tmp_path: Path) -> None:
    trainer(logger=CSVLogger(tmp_path)).test(small(), batches(), verbose=False)
    assert not shown(tmp_path)


def test_a_picture_that_fails_is_a_warning(tmp_path: Path) -> None:
    def make() -> Tensor:
        raise OSError("no space left")

    with pytest.warns(UserWarning, match="val/samples of step 0 is not shown: OSError: no space left"):
        samples.show(trainer(logger=CSVLogger(tmp_path)), "val/samples", make)


def once_per_step(table: Path) -> None:
    """Each figure stands once in the table for each step."""
    seen: set[tuple[str, str]] = set()
    for row in rows(table):
        for name, value in row.items():
            if value and name not in {"epoch", "step"}:
                assert (name, row["step"]) not in seen, name
                seen.add((name, row["step"]))
    assert ("train/lr", "0") in seen
    assert ("val/loss", "1") in seen or ("val/loss", "3") in seen


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_log_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """The rows of both count as samples; the solves are those of the first."""
    several = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {}
    clock = Clock(monkeypatch)
    module = small(schedule="constant")
    train(module, clock, logger=CSVLogger(tmp_path, name="", version="run"), **several)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    once_per_step(tmp_path / "run" / "metrics.csv")
    speed = {row["train/samples_per_second"] for row in rows(tmp_path / "run" / "metrics.csv") if row["train/loss"]}
    assert {float(each) for each in speed} == {processes * 20 / 2}
    step = f"{4 // processes:06d}"
    assert shown(tmp_path) == {f"run/pictures/val_{name}_{step}.png" for name in ("samples", "convergence")}


def test_all_processes_let_a_language_model_go_on(tmp_path: Path) -> None:
    """Each as often as the others, as its cell may have them wait for each other; the first one writes."""
    module = texts.small(schedule="constant")
    module.model.deq.on_failure = "ignore"
    run = trainer(
        logger=CSVLogger(tmp_path, name="", version="run"),
        strategy="ddp_fork",
        devices=2,
        limit_train_batches=2,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    run.fit(module, datamodule=texts.texts(batch_size=2))
    assert "run/samples/val_samples_000002.txt" in shown(tmp_path)


# ------------------------------------------------------------------------------------------------------ what is on them


def has(picture: Tensor, colour: tuple[int, int, int]) -> bool:
    """As more than the edge of a letter has it."""
    return int((picture == torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)).all(dim=0).sum()) > 50


def test_right_and_wrong_classes_look_different() -> None:
    images, logits = torch.rand(3, 1, 8, 8), torch.eye(3)
    for labels, right, wrong in (([0, 1, 2], True, False), ([1, 2, 0], False, True), ([0, 1, 0], True, True)):
        picture = samples.classified(images, logits, torch.tensor(labels), ("a", "b", "c"))
        assert (has(picture, RIGHT), has(picture, WRONG)) == (right, wrong)


def test_maps_have_the_colours_of_their_classes_and_grey_where_nothing_is_known() -> None:
    labels = torch.full((1, 4, 4), 255)
    labels[:, :2] = 1
    picture = samples.segmented(torch.zeros(1, 1, 4, 4), torch.full((1, 4, 4), 9), labels, 255, None)
    colours = palette(10)
    assert [has(picture, colours[k]) for k in (1, 9, 2, 3)] == [True, True, False, False]
    assert has(picture, samples.IGNORED)
    assert not has(
        samples.segmented(torch.zeros(1, 1, 4, 4), labels.clamp(max=1), labels.clamp(max=1), 255, None), samples.IGNORED
    )
    assert len(set(palette(150))) > 100


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (3, 700), (1500, 900)])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_images_of_any_kind_are_drawn(size: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    images = (10 * torch.rand(1, channels, *size)).to(dtype)
    logits = torch.tensor([[0.0, 1.0]]).to(dtype)
    picture = samples.classified(images, logits, torch.tensor([1]), None)
    assert picture.dtype == torch.uint8
    assert max(picture.shape) < 600
    labels = torch.zeros(1, *size, dtype=torch.int64)
    assert max(samples.segmented(images, labels, labels, 255, None).shape) < 1400


def test_what_is_no_number_is_seen() -> None:
    """And the others are as they are."""
    image = torch.rand(3, 4, 4)
    image[0, 0, 0], image[1, 2, 2] = torch.nan, torch.inf
    found = pixels(image)
    bad = (found == torch.tensor([255, 0, 255], dtype=torch.uint8).view(3, 1, 1)).all(dim=0)
    assert bad.nonzero().tolist() == [[0, 0], [2, 2]]
    assert torch.equal(found[:, ~bad], (255 * image).round().to(torch.uint8)[:, ~bad])
    assert (pixels(torch.full((1, 2, 2), torch.nan))[1] == 0).all()


def test_small_images_are_enlarged_by_whole_factors_and_large_ones_shrunk() -> None:
    small_one = torch.arange(12, dtype=torch.uint8).view(1, 2, 6).expand(3, 2, 6)
    enlarged = sized(small_one, 20, 100, smooth=True)
    assert torch.equal(enlarged[:, ::3, ::3], small_one)
    assert enlarged.shape == (3, 6, 18)
    assert sized(torch.zeros(3, 400, 100, dtype=torch.uint8), 20, 100, smooth=False).shape == (3, 100, 25)


class Letters:
    """A data module as far as :class:`LanguageModel` asks."""

    def decode(self, tokens: Tensor) -> str:
        return "".join("abcdefghij\x00"[int(k)] for k in tokens)


@pytest.mark.parametrize("data", [None, Letters()])
def test_a_text_goes_on_twice(data: Any) -> None:
    """As it is in the data, and as the model would; control characters are none of it."""
    module = texts.small().eval()
    module._trainer = SimpleNamespace(datamodule=data, world_size=1)
    tokens = torch.arange(22).view(2, 11) % 11
    target = (tokens + 1) % 11
    read, goes_on, written = module._continued(tokens, target)
    assert torch.equal(torch.cat([read, goes_on], dim=1), torch.cat([tokens, target[:, -1:]], dim=1))
    assert written.shape == goes_on.shape == (2, 6)
    assert torch.equal(module._continued(tokens, target)[2], written), "its random numbers are its own"
    text = samples.continued(*(map(module._text, each) for each in (read, goes_on, written)))
    assert text.count("how it goes on in the data") == 2
    assert ("abcdef" if data else "0 1 2 3 4 5") in text
    assert "\x00" not in text


def test_a_text_is_a_file_where_no_logger_takes_it(tmp_path: Path) -> None:
    log_text(trainer(logger=CSVLogger(tmp_path, name="", version="run")), "val/samples", "a\n  b é")
    assert (tmp_path / "run" / "samples" / "val_samples_000000.txt").read_text(encoding="utf-8") == "a\n  b é\n"


def test_each_layer_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first few samples, from the first call; a failing solve says nothing here."""
    module = small()
    other = DEQ(module.model.deq.cell, Anderson(max_steps=1, tol=1e-9), on_failure="raise")
    module.model.second = other
    x = torch.rand(3, 6)
    calls = [(module.model.deq, (x,)), (other, (x,)), (other, (x[:1],))]
    reports = samples.traced(module, calls)
    assert list(reports) == ["deq", "second"]
    assert reports["second"].trace is not None
    assert reports["second"].trace.shape[1] == 3
    assert not reports["second"].converged.any()
    assert (module.model.deq.report, other.report, other.on_failure) == (None, None, "raise")
    assert samples.convergence(module, reports).shape[0] == 3
    assert samples.traced(module, [(other, (x[:0],))]) == {}

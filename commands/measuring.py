"""Measuring weights: a model that is loaded, the task and the data of its record, and what came out."""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from types import ModuleType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

import datamodules
import lightning_modules
import zoo
from lightning_modules import EquilibriumModule
from lightning_modules.memory import PeakMemory
from zoo.implicit import DEQ, ConvergenceWarning, SolverReport
from zoo.implicit.choices import nearest

from .quiet import silence_what_users_cannot_act_on

METRICS = ("accuracy", "miou", "pixel_accuracy", "bits_per_byte", "epe", "epe_zero", "converged")
"""What is recorded of the measures that a task logs, where the task has them."""

PARTS = {"val": ("val",), "test": ("test",), "both": ("val", "test")}
"""Parts of the data, in the order in which they are read."""

LOOKED_AT = 1
"""The number of the batch whose memory is looked at; those before it warm up, those after it are timed."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a model. The solver's figures, time and memory are those of the last part that was read.

    Attributes:
        metrics: all that the task logged, by names like ``"test_accuracy"``.
        evaluations: how often a solve called the cell on its batch, as a mean over solves.
        residual: mean over samples.
        converged: fraction of the samples.
        spectral_radius: of df/dz at z*, mean over a few samples of the first batch.
        milliseconds: a sample: the median over batches of the time of a test step, which is the model and the measures,
            not the loading of data. The first two batches do not count: one warms up, one is looked at for memory.
        megabytes: a sample, in 10^6 bytes: the peak of what the second batch takes above what was there before it, over
            its samples; on a GPU the allocator's, else that of live tensors.
        seconds: of everything.

    A sample is a row of a solve: an image, a pair of frames, a segment of a text. What does not apply is None, as time
    is where there are fewer than three batches.
    """

    metrics: dict[str, float]
    evaluations: float | None
    residual: float | None
    converged: float | None
    spectral_radius: float | None
    milliseconds: float | None
    megabytes: float | None
    seconds: float


def evaluation_of(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """The ``evaluation`` of a record, from what made a checkpoint (:func:`read_checkpoint`): what testing takes.

    Arguments of the task that make the model or train it are left out.

    Raises:
        ValueError: the checkpoint does not say which data it was trained on.
    """
    if "data" not in made_by:
        raise ValueError(
            "this checkpoint was trained without a data module, so that it does not say what to test it on; name "
            "weights that are tested on the same data (--as NAME)"
        )
    training = inspect.signature(EquilibriumModule).parameters
    task, data = made_by["model"], made_by["data"]
    own = {key: value for key, value in task["init_args"].items() if key not in training and not key.startswith("_")}
    return {
        "task": {"class_path": task["class_path"], "init_args": own},
        "data": {"class_path": data["class_path"], "init_args": dict(data["init_args"])},
    }


def measure(
    model: nn.Module,
    evaluation: Mapping[str, Any],
    *,
    split: str = "test",
    device: str = "auto",
    batch_size: int | None = None,
    limit: int | None = None,
    data_root: str | None = None,
) -> Measured:
    """Test a model as a record says.

    Args:
        model: as :func:`zoo.load_pretrained` gives it.
        evaluation: of its record: ``{"task": {"class_path": ..., "init_args": {...}}, "data": {...}}``.
        split: a key of :data:`PARTS`.
        device: an accelerator of Lightning's; one device of it is used.
        batch_size: in place of the data's own.
        limit: at most so many batches of each part.
        data_root: where the data are, for those that are not made from what is installed.

    Raises:
        ValueError: an unknown class or argument.
        FileNotFoundError: the data are not here; the message says how to get them.
    """
    started = time.monotonic()
    task = _task(model, evaluation["task"])
    data = _data(evaluation["data"], batch_size, data_root)
    gauge = Gauge()
    found: dict[str, float] = {}
    with _quiet():
        trainer = pl.Trainer(
            accelerator=device,
            devices=1,
            callbacks=[gauge],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            limit_val_batches=limit,
            limit_test_batches=limit,
        )
        for part in PARTS[split]:
            run = trainer.validate if part == "val" else trainer.test
            found.update(run(task, data, verbose=False)[0])
    last = PARTS[split][-1]
    return Measured(
        metrics={key.replace("/", "_"): float(value) for key, value in found.items()},
        evaluations=_mean(gauge.evaluations),
        residual=_mean(_of_layers(found, last, "residual")),
        converged=_mean(_of_layers(found, last, "converged")),
        spectral_radius=_mean(_of_layers(found, last, "spectral_radius")),
        milliseconds=median(gauge.milliseconds) if gauge.milliseconds else None,
        megabytes=gauge.megabytes,
        seconds=time.monotonic() - started,
    )


class Gauge(Callback):
    """Counts evaluations, and takes time and memory of validation and test steps; see :class:`Measured`."""

    def __init__(self) -> None:
        self._hooks, self._looking = ExitStack(), ExitStack()
        self._begin()

    def _begin(self) -> None:
        self.evaluations: list[float] = []
        self.milliseconds: list[float] = []
        self.megabytes: float | None = None
        self._layers = self._rows = 0
        self._started = 0.0
        self._peak: Callable[[], int] = int

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to the equilibrium layers, from nothing."""
        self._begin()
        layers = [layer for layer in pl_module.modules() if isinstance(layer, DEQ)]
        self._layers = len(layers)
        for layer in layers:
            self._hooks.callback(layer.register_forward_hook(self._count).remove)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen no longer."""
        self._hooks.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Listen no longer, and look no longer."""
        self._looking.close()
        self._hooks.close()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start the clock, or look at the memory."""
        self._start(pl_module.device, batch_idx)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start the clock, or look at the memory."""
        self._start(pl_module.device, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take what was measured."""
        self._stop(pl_module.device, batch, batch_idx)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take what was measured."""
        self._stop(pl_module.device, batch, batch_idx)

    def _count(self, layer: nn.Module, given: Any, returned: tuple[Any, ...]) -> None:
        report: SolverReport = returned[1]
        self.evaluations.append(report.evaluations)
        self._rows += report.steps.numel()

    def _start(self, device: torch.device, index: int) -> None:
        self._rows = 0
        if index == LOOKED_AT:
            self._peak = self._looking.enter_context(_peak_bytes(device))
        self._started = _now(device)

    def _stop(self, device: torch.device, batch: Any, index: int) -> None:
        taken = _now(device) - self._started
        samples = self._rows / self._layers if self._layers else len(batch[0])
        if index == LOOKED_AT:
            self._looking.close()
            self.megabytes = self._peak() / samples / 1e6
        elif index > LOOKED_AT:
            self.milliseconds.append(1e3 * taken / samples)


@contextmanager
def _peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Within this context memory is looked at; what it gives tells the peak above what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    else:
        with PeakMemory() as memory:
            yield lambda: memory.peak


def _now(device: torch.device) -> float:
    """Seconds, after all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _task(model: nn.Module, chosen: Mapping[str, Any]) -> EquilibriumModule:
    """The task that tests this model."""
    cls = public_class(chosen["class_path"], lightning_modules, EquilibriumModule)
    spec, own = zoo.spec_of(model), dict(chosen["init_args"])
    arguments = {key: value for key, value in spec.arguments.items() if key not in own}
    task: EquilibriumModule = cls(model=spec.model, model_args=arguments, **own)
    task.model = model
    return task.eval()


def _data(chosen: Mapping[str, Any], batch_size: int | None, root: str | None) -> pl.LightningDataModule:
    """The data, in batches of another size and from another folder where that is asked for."""
    cls = public_class(chosen["class_path"], datamodules, pl.LightningDataModule)
    arguments = dict(chosen["init_args"])
    known = inspect.signature(cls).parameters
    if batch_size is not None:
        arguments.update({key: batch_size for key in ("batch_size", "eval_batch_size") if key in known})
    if root is not None and "root" in known:
        arguments["root"] = root
    data: pl.LightningDataModule = cls(**arguments)
    return data


def public_class(path: str, package: ModuleType, kind: type) -> Any:
    """A public class of this package, of this kind; nothing else is ever imported or called.

    Raises:
        ValueError: it is none.
    """
    module, _, name = path.rpartition(".")
    known = [
        each for each in package.__all__ if isinstance(cls := getattr(package, each), type) and issubclass(cls, kind)
    ]
    if module != package.__name__ or name not in known:
        names = [f"{package.__name__}.{each}" for each in known]
        raise ValueError(f"an evaluation takes a class of {package.__name__}; given: {path!r}.{nearest(path, names)}")
    return getattr(package, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning says nothing of each run; what did not converge is in the figures."""
    silence_what_users_cannot_act_on()
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            logger.setLevel(logging.WARNING)
            yield
        finally:
            logger.setLevel(level)


def _of_layers(found: Mapping[str, float], part: str, name: str) -> list[float]:
    """What was logged under this name in a part of the data, of each equilibrium layer."""
    return [float(v) for key, v in found.items() if key.startswith(f"{part}/") and key.rpartition("/")[2] == name]


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None

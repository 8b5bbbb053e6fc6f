"""What every task shares: making the model, solver statistics in the log, its training's stages, the optimizer."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, WeightAveraging
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import zoo
from zoo.freezing import frozen_statistics
from zoo.implicit import DEQ, Gradient, Solver, jacobian_penalty, one_draw, spectral_radius
from zoo.registry import plain

from . import samples
from .optimizers import Cosine, OneCycle, WarmUp, make_optimizer
from .options import refuse_out_of_range, require
from .run_seed import RunSeed, correct_progress
from .sharding import class_of, refuse_other_strategies
from .standard_callbacks import standard_callbacks
from .starting_weights import freeze_parts, started

log = logging.getLogger("zoo")

OBSERVED = 4
"""Samples of a batch whose spectral radius is looked at: each costs 20 vectors of the size of its state."""


class EquilibriumModule(pl.LightningModule):
    """The base of all tasks: one equilibrium model, trained and watched.

    Subclasses pass ``**options`` on to ``super().__init__``, then call ``self.save_plain_hyperparameters(...)`` with
    the arguments that are their own, and write the usual steps.

    Logged at each training step, and as epoch means in validation and testing, for each equilibrium layer:
    ``steps`` (solver updates a sample), ``residual`` (mean over samples), ``converged`` (fraction of samples) and, in
    training, ``adjoint_steps``.

    Training may begin with steps in which nothing is solved: the cell is applied a few times, and all of them are
    backpropagated through, as in Bai, Koltun and Kolter, "Multiscale Deep Equilibrium Models" (NeurIPS 2020).
    Validation and testing always solve.

    Args:
        model: a name of ``zoo.list_models()``.
        model_args: the model's arguments, plain numbers and words.
        pretrained: start from these weights: whatever ``zoo.load_pretrained`` takes; ``model`` must be theirs.
        backbone: start stem and equilibrium from those of another model, the head at random: what
            ``zoo.load_pretrained`` takes, or a file that ``zoo.load_original`` reads.
        weights_from: start from all weights of this file, with a new optimizer, as one stage of training goes on from
            another: a checkpoint of a run, or anything else that ``zoo.load_pretrained`` or ``zoo.load_original``
            takes.
        freeze: parts of the model that training leaves as they are, patterns of the names of its parameters, like
            ``["stem.*", "deq.*"]``; see :func:`zoo.freeze`.
        solver: how the equilibrium is solved, like ``Anderson``; the model's own choice if not given. An object, its
            plain description, or a name.
        gradient: how the equilibrium is differentiated, like ``ImplicitGradient``; likewise.
        pretrain_steps: training steps at the beginning of the run in which the cell is unrolled.
        pretrain_depth: applications of the cell in these steps.
        compile: have ``torch.compile`` make code of the cells, which are what is iterated; see ``CompileCells``.
        jacobian_weight: weight of the Jacobian penalty in the training loss (Bai, Koltun and Kolter, ICML 2021).
        jacobian_frequency: the fraction of training steps, drawn at random, that have the penalty.
        jacobian_probes: random vectors of the estimate; see ``zoo.implicit.jacobian_penalty``.
        jacobian_growth: added to jacobian_weight after every jacobian_growth_interval training steps that solve.
        jacobian_growth_interval: see jacobian_growth.
        jacobian_end_epoch: from this epoch on, counted from 0, there is no penalty.
        jacobian_pretrain_weight: weight of the penalty in the unrolled steps.
        max_steps_jitter: where there is the penalty, the solver's max_steps is changed by a random integer: from low to
            high, both included, for two numbers ``[low, high]``; from -k to k - 1 for one number k.
        optimizer: a class of ``torch.optim``, unless ``--optimizer`` chooses one.
        optimizer_args: its arguments besides lr and weight_decay, like ``{momentum: 0.9, nesterov: true}``.
        lr: peak learning rate.
        weight_decay: the optimizer's own kind of it.
        schedule: of the learning rate over the whole run, per step: ``cosine`` down to min_lr, ``one_cycle`` from
            lr / 25 up to lr and down to next to nothing, or ``constant``.
        min_lr: where ``cosine`` ends.
        warmup_steps: steps at the beginning of the run in which the learning rate rises linearly from 0 towards lr; the
            schedule, which counts them too, takes over after them. ``one_cycle`` has a rise of its own.
        warmup_fraction: the fraction of the run in which the learning rate of ``one_cycle`` rises.
        schedule_margin: ``one_cycle`` ends so many steps after the run; 100 in the published training of RAFT and of
            DEQ flow.
        show_every: the first validation of a run, and one of so many, give the loggers samples of their first batch
            with their predictions, and a plot of how the solves converged; 0 gives none.

    Raises:
        ValueError: an unknown name, or an argument out of its range.
        CheckpointError, WeightsError: what to start from cannot be read, or has other weights than the model.
    """

    _validations = 0

    def __init__(
        self,
        model: str,
        model_args: Mapping[str, Any] | None = None,
        pretrained: str | None = None,
        backbone: str | None = None,
        weights_from: str | None = None,
        freeze: list[str] | None = None,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        pretrain_steps: int = 0,
        pretrain_depth: int = 5,
        compile: bool = False,  # noqa: A002 - what torch calls it
        jacobian_weight: float = 0.0,
        jacobian_frequency: float = 1.0,
        jacobian_probes: int = 1,
        jacobian_growth: float = 0.0,
        jacobian_growth_interval: int = 10_000,
        jacobian_end_epoch: int | None = None,
        jacobian_pretrain_weight: float = 0.0,
        max_steps_jitter: int | list[int] = 0,
        optimizer: str = "AdamW",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Literal["cosine", "one_cycle", "constant"] = "cosine",
        min_lr: float = 0.0,
        warmup_steps: int = 0,
        warmup_fraction: float = 0.05,
        schedule_margin: int = 0,
        show_every: int = 1,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        refuse_out_of_range(given)
        arguments = dict(model_args or {})
        choices = {"solver": solver, "gradient": gradient}
        arguments.update({key: value for key, value in choices.items() if value is not None})
        self.model = started(model, arguments, pretrained, backbone, weights_from)
        freeze_parts(self.model, freeze)
        require(
            bool(self.equilibria()) or not any((pretrain_steps, jacobian_weight, jacobian_growth)),
            f"pretrain_steps, jacobian_weight and jacobian_growth take 0 for {model!r}, which has no equilibrium layer",
            *(pretrain_steps, jacobian_weight, jacobian_growth),
        )
        self.pretrain_steps = pretrain_steps
        self.pretrain_depth, self.compiles = pretrain_depth, compile
        self.jacobian_weight = jacobian_weight
        self.jacobian_frequency = jacobian_frequency
        self.jacobian_probes = jacobian_probes
        self.jacobian_growth = jacobian_growth
        self.jacobian_growth_interval = jacobian_growth_interval
        self.jacobian_end_epoch = jacobian_end_epoch
        self.jacobian_pretrain_weight = jacobian_pretrain_weight
        self.max_steps_jitter = max_steps_jitter
        self.optimizer = optimizer
        self.optimizer_args = dict(optimizer_args or {})
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.min_lr = min_lr
        self.warmup_steps = warmup_steps
        self.warmup_fraction = warmup_fraction
        self.schedule_margin, self.show_every = schedule_margin, show_every
        self._in_silence, self.run_seed = ExitStack(), RunSeed()
        self._make_optimizer()  # what it refuses is said now
        self.save_plain_hyperparameters(**given)

    def save_plain_hyperparameters(self, **arguments: Any) -> None:
        """Keep init arguments as plain data, so that checkpoints load under ``weights_only=True``.

        What is saved later replaces what was saved before under the same name.
        """
        self.save_hyperparameters(plain(arguments))

    def refuse_data_unless(self, **mine: Any) -> None:
        """Raise MisconfigurationException unless the data, where they say how they are, are as the model is."""
        data = getattr(self.trainer, "datamodule", None)
        for name, value in mine.items():
            theirs = getattr(data, name, None)
            if theirs not in (None, value):
                have = f"{theirs} classes" if name == "num_classes" else f"{name}={theirs}"
                raise MisconfigurationException(
                    f"the data have {have}, and the model was asked for {value}: "
                    f"give it {name}={theirs} (--model.{name} {theirs})"
                )

    def configure_callbacks(self) -> list[Callback]:
        """What every run has besides what it was given; see ``standard_callbacks``."""
        refuse_other_strategies(self.trainer)  # the first that is called of this module, before there are processes
        return standard_callbacks(self.trainer)

    def on_fit_start(self) -> None:
        """Lightning need not warn of modules in eval mode where these are the frozen normalisations, and no other."""
        if frozen := frozen_statistics(self.model):
            self._in_silence.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=rf"Found {len(frozen)} module\(s\) in eval mode")

    def on_train_start(self) -> None:
        """It has looked by now, and all that a run goes on from was loaded."""
        self._in_silence.close()
        self.run_seed.begin(self.trainer)
        correct_progress(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Let what this step draws follow from the run's seed, and from nothing that was drawn before."""
        self.run_seed.seed_step(self.trainer, batch_index)

    def teardown(self, stage: str) -> None:
        """What a fit that failed before left behind."""
        self._in_silence.close()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the run's seed; say so where a run with averages goes on without.

        That is from the averages, and with an optimizer of other weights.
        """
        if self._trainer is None or self._trainer.state.fn != "fit":
            return
        self.run_seed.load(checkpoint)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not any(isinstance(each, WeightAveraging) for each in callbacks):
            log.warning(
                "the checkpoint has averaged weights, and training goes on from them; give the callback that averages "
                "too (-c configs/ema.yaml) to go on from those of its last step"
            )

    def inference_spec(self) -> zoo.ModelSpec:
        """What makes the model as it is tested; checkpoints say it, so that ``zoo.load_pretrained`` takes them."""
        return zoo.spec_of(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which classes and which model made this run, so that who reads the checkpoint needs nothing else."""
        classes = {"model": _class_path(self)}
        data: pl.LightningDataModule | None = getattr(self.trainer, "datamodule", None)
        if data is not None:
            classes["data"] = _class_path(data)
        checkpoint["deq_zoo_classes"] = classes
        self.run_seed.save(checkpoint)
        spec = self.inference_spec()
        checkpoint["deq_zoo_model"] = {"model": spec.model, "arguments": spec.arguments}
        hyper_parameters = checkpoint.get("hyper_parameters", {})
        # All weights are in the checkpoint: it says what the model is, and no longer needs what it started from.
        for name in ("backbone", "weights_from"):
            if hyper_parameters.get(name) is not None:
                hyper_parameters[name] = None
        if hyper_parameters.get("pretrained") is not None:
            made_of = dict(zoo.spec_of(self.model).arguments)
            choices = {key: made_of.pop(key, None) for key in ("solver", "gradient")}
            arguments = {key: value for key, value in made_of.items() if key not in hyper_parameters}
            hyper_parameters.update(pretrained=None, model_args=arguments, **choices)

    def equilibria(self) -> dict[str, DEQ]:
        """The equilibrium layers of the model, by name in the log: ``""`` if there is one, else ``"<module>/"``."""
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, DEQ)}
        return {"": next(iter(layers.values()))} if len(layers) == 1 else {f"{k}/": v for k, v in layers.items()}

    def of_joint_batch(self, weight: Tensor) -> Tensor:
        """The mean over processes of what a loss is divided by, like the number of pixels that count in a batch.

        With it the mean of the processes' gradients is the gradient of their joint batch, however uneven the numbers.
        """
        if self._trainer is None or self.trainer.world_size == 1:
            return weight
        return cast(Tensor, self.trainer.strategy.reduce(weight.detach().clone(), reduce_op="mean"))

    def on_step_begin(self) -> None:
        """Called before the first batch of a training step; remember what :meth:`on_step_undone` takes."""

    def on_step_undone(self) -> None:
        """Called where training is interrupted within a step, which will be made again: be as before it.

        Parameters and buffers are; what a module keeps besides, like a memory, is its own matter.
        """

    def on_step_skipped(self) -> None:
        """Called after a training step that does not count, see :class:`SkippedSteps`; the model is as before it."""

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """As Lightning's; the mean over processes of how much their batches weigh is no whole number.

        Lightning 2.6 rounds it down where the weights are whole numbers: of 3 and 2 samples the mean would be 2, and
        the loss of all five a quarter too large.
        """
        if options.get("batch_size") is not None:
            options["batch_size"] = float(options["batch_size"])
        super().log(name, value, *args, **options)

    # --- solver statistics

    def on_train_batch_end(self, *args: Any) -> None:
        """Log what the forward and the adjoint solves did."""
        self._log_solver("train", on_step=True, on_epoch=False)

    def on_validation_batch_end(self, *args: Any) -> None:
        """Log what the solves did."""
        self._log_solver("val", on_step=False, on_epoch=True)

    def on_test_batch_end(self, *args: Any) -> None:
        """Log what the solves did."""
        self._log_solver("test", on_step=False, on_epoch=True)

    def _log_solver(self, stage: str, *, on_step: bool, on_epoch: bool) -> None:
        for name, deq in self.equilibria().items():
            if deq.report is None:
                continue
            batch = deq.report.steps.numel()
            values = {
                "steps": deq.report.steps.float().mean(),
                "residual": deq.report.residual.float().mean(),
                "converged": deq.report.converged.float().mean(),
            }
            if stage == "train" and deq.adjoint_report is not None:
                values["adjoint_steps"] = deq.adjoint_report.steps.float().mean()
            for key, value in values.items():
                self.log(
                    f"{stage}/{name}{key}",
                    value,
                    on_step=on_step,
                    on_epoch=on_epoch,
                    prog_bar=stage == "train" and key == "steps",
                    batch_size=batch,
                    sync_dist=on_epoch,
                )

    # --- regularisation

    def jacobian_weight_at(self, step: int, epoch: int) -> float:
        """The weight of the penalty in this step of the run, if the step has one; both are counted from 0.

        In the unrolled steps it is jacobian_pretrain_weight; after them jacobian_weight, which grows; from
        jacobian_end_epoch on it is 0.
        """
        if self.jacobian_end_epoch is not None and epoch >= self.jacobian_end_epoch:
            return 0.0
        solved = step - self.pretrain_steps
        if solved < 0:
            return self.jacobian_pretrain_weight
        return self.jacobian_weight + self.jacobian_growth * (solved // self.jacobian_growth_interval)

    def jacobian_draw_at(self, step: int) -> tuple[bool, int]:
        """Whether this step of the run has the penalty, and by how much ``max_steps`` is then changed.

        That follows from the run's seed and the number of the step: all processes decide alike, so that none has to
        wait for the penalty of another, and a resumed run decides as one that never stopped.
        """
        draws = torch.Generator().manual_seed((self.run_seed.value * 1_000_003 + step) % 2**63)
        wanted = float(torch.rand((), generator=draws)) < self.jacobian_frequency
        k = self.max_steps_jitter
        low, high = (-k, max(0, k - 1)) if isinstance(k, int) else k
        return wanted, int(torch.randint(low, high + 1, (), generator=draws))

    def regularized(self, stage: str, *inputs: Any, forward: Callable[..., Any] | None = None) -> tuple[Any, Tensor]:
        """The model's output for these inputs, and the Jacobian term of the loss: 0 where it is not asked for.

        In training the cell is unrolled while the run is in its first ``pretrain_steps`` steps.

        Args:
            stage: ``"train"``, ``"val"`` or ``"test"``.
            inputs: of the model.
            forward: what is called with them, within the settings of this step; the model itself if not given.

        Returns:
            the output and a scalar.
        """
        model = self.model if forward is None else forward
        if stage != "train":
            return model(*inputs), torch.zeros((), device=self.device)
        step = self.global_step
        unrolled = self.pretrain_depth if step < self.pretrain_steps else None
        if self.pretrain_steps > 0:
            self.log("train/unrolled", float(unrolled is not None))
        weight = self.jacobian_weight_at(step, self.current_epoch)
        wanted, jitter = self.jacobian_draw_at(step)
        if weight == 0 or not wanted:
            with self._solving(unrolled):
                return model(*inputs), torch.zeros((), device=self.device)
        # The penalty is taken under the dropout masks of the solve.
        with one_draw(), self._solving(unrolled, jitter), self._calls_recorded() as calls:
            output = model(*inputs)
            penalties: dict[DEQ, list[Tensor]] = {}
            for deq, x, z in calls:
                values = jacobian_penalty(deq.cell, z, *x, probes=self.jacobian_probes)
                penalties.setdefault(deq, []).append(values.mean())
        # Of several calls of a layer, as for the pairs of a video, the mean.
        penalty = torch.stack([torch.stack(of_layer).mean() for of_layer in penalties.values()]).sum()
        self.log("train/jacobian", penalty.detach())
        return output, weight * penalty

    @contextmanager
    def _solving(self, unrolled: int | None, jitter: int = 0) -> Iterator[None]:
        """Within this context layers are unrolled so often, if asked for, and else solve with other ``max_steps``."""
        before = [(deq, deq.unrolled, deq.solver) for deq in self.equilibria().values()]
        try:
            for deq, own, solver in before:
                deq.unrolled = own if unrolled is None else unrolled
                deq.solver = replace(solver, max_steps=max(1, solver.max_steps + jitter)) if jitter else solver
            yield
        finally:
            for deq, own, solver in before:
                deq.unrolled, deq.solver = own, solver

    # --- diagnostics

    def observed(self, stage: str, batch_index: int, *inputs: Any, forward: Callable[..., Any] | None = None) -> Any:
        """The model's output for these inputs; see :meth:`regularized`.

        At the first batch of a stage the spectral radius of df/dz at z* is logged, as the mean over its first few
        samples and over the calls of a layer: below 1 plain iteration converges. Where a validation :meth:`shows` its
        samples, the convergence of the same few is drawn as ``val/convergence``.
        """
        model = self.model if forward is None else forward
        if batch_index > 0:
            return model(*inputs)
        with self._calls_recorded() as calls:
            output = model(*inputs)
        for name, layer in self.equilibria().items():
            start = torch.Generator().manual_seed(0)  # leaves the global stream alone
            some = [(deq.cell, *_first_rows(z, x)) for deq, x, z in calls if deq is layer]
            found = [spectral_radius(cell, z, *x, generator=start) for cell, z, x in some]
            if found:
                key = f"{stage}/{name}spectral_radius"
                self.log(key, torch.stack(found).float().mean(), on_epoch=True, batch_size=1, sync_dist=True)
        if stage == "val" and not (self._trainer is None or self.trainer.sanity_checking):
            self._validations += 1
        if self.shows(stage, batch_index):
            reports = samples.traced(self, ((deq, _first_rows(z, x)[1]) for deq, x, z in calls))
            if reports:
                samples.show(self.trainer, "val/convergence", lambda: samples.convergence(self, reports))
        return output

    def shows(self, stage: str, batch_index: int) -> bool:
        """Whether the loggers are given samples of this batch, which :meth:`observed` has seen.

        It is the first one of a validation that ``show_every`` asks for, not of the sanity check, in a run with a
        logger. All processes say the same.
        """
        if self._trainer is None or self.show_every == 0:
            return False
        wanted = self._validations == 1 or self._validations % self.show_every == 0
        return wanted and samples.are_shown(self.trainer, stage, batch_index)

    @contextmanager
    def _calls_recorded(self) -> Iterator[list[tuple[DEQ, tuple[Any, ...], Any]]]:
        """The calls of all equilibrium layers within this context, as (layer, inputs, z*)."""
        calls: list[tuple[DEQ, tuple[Any, ...], Any]] = []

        def record(deq: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
            assert isinstance(deq, DEQ)  # noqa: S101 - for the type checker; hooks stand on DEQs only
            calls.append((deq, inputs, output[0]))

        handles = [deq.register_forward_hook(record) for deq in self.equilibria().values()]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    # --- optimisation

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As the trainer says; a step that is skipped has no gradients, which ``clip_grad_value_`` does not take."""
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """The optimizer over the parameters that require gradients, with the schedule."""
        optimizer = self._make_optimizer()
        if self.schedule == "constant":
            return self._scheduled(optimizer, WarmUp(optimizer, self.warmup_steps)) if self.warmup_steps else optimizer
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise MisconfigurationException(
                f"schedule={self.schedule} takes the length of the run: give the trainer max_epochs or max_steps, or "
                "take schedule=constant (--model.schedule constant)"
            )
        steps = max(1, int(steps))
        if self.schedule == "one_cycle":
            return self._scheduled(optimizer, OneCycle(optimizer, steps + self.schedule_margin, self.warmup_fraction))
        return self._scheduled(optimizer, Cosine(optimizer, steps, self.min_lr, self.warmup_steps))

    @staticmethod
    def _scheduled(optimizer: torch.optim.Optimizer, schedule: WarmUp) -> dict[str, Any]:
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return make_optimizer(self.optimizer, parameters, self.lr, self.weight_decay, self.optimizer_args)


def _first_rows(z: Any, inputs: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The first samples of a state and of the inputs that go with it."""
    found: tuple[Any, tuple[Any, ...]] = pytree.tree_map_only(Tensor, lambda x: x[:OBSERVED], (z, inputs))
    return found


def _class_path(thing: object) -> str:
    """Where the class is imported from: its package if it is public there, as configurations name it."""
    cls = class_of(thing)
    package = cls.__module__.partition(".")[0]
    public = getattr(sys.modules[package], cls.__name__, None) is cls
    return f"{package if public else cls.__module__}.{cls.__qualname__}"

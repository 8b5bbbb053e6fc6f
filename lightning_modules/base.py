"""What every task shares: making the model, solver statistics in the log, Jacobian regularisation, the optimizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import zoo
from zoo.implicit import DEQ, Gradient, Solver, jacobian_penalty, one_draw, spectral_radius
from zoo.registry import plain


class EquilibriumModule(pl.LightningModule):
    """The base of all tasks: one equilibrium model, trained and watched.

    Subclasses call ``super().__init__``, then ``self.save_plain_hyperparameters(...)``, and write the usual steps.

    Logged at each training step, and as epoch means in validation and testing, for each equilibrium layer:
    ``steps`` (solver updates a sample), ``residual`` (mean over samples), ``converged`` (fraction of samples) and, in
    training, ``adjoint_steps``.

    Args:
        model: a name of ``zoo.list_models()``.
        model_args: the model's arguments, plain numbers and words.
        pretrained: start from these weights, a name of ``zoo.list_weights()``; ``model`` must be theirs.
        solver: how the equilibrium is solved, like ``Anderson``; the model's own choice if not given. An object, its
            plain description, or a name.
        gradient: how the equilibrium is differentiated, like ``ImplicitGradient``; likewise.
        jacobian_weight: adds this times the mean of ``zoo.implicit.jacobian_penalty`` to the training loss.
        jacobian_frequency: the fraction of training steps, drawn at random, at which that is done.
        lr: peak learning rate of AdamW, unless ``--optimizer`` chooses another optimizer.
        weight_decay: of AdamW.
        schedule: of the learning rate over the whole run, per step: ``cosine`` to zero, or ``constant``.

    Raises:
        ValueError: an unknown name, or an argument out of its range.
    """

    def __init__(
        self,
        model: str,
        model_args: Mapping[str, Any] | None = None,
        pretrained: str | None = None,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        jacobian_weight: float = 0.0,
        jacobian_frequency: float = 1.0,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        super().__init__()
        if jacobian_weight < 0 or not 0 <= jacobian_frequency <= 1:
            raise ValueError(
                "jacobian_weight takes a number >= 0 and jacobian_frequency one in [0, 1]; "
                f"given: {jacobian_weight!r} and {jacobian_frequency!r}"
            )
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr and weight_decay take numbers >= 0; given: {lr!r} and {weight_decay!r}")
        if schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule takes 'cosine' or 'constant'; given: {schedule!r}")
        arguments = dict(model_args or {})
        choices = {"solver": solver, "gradient": gradient}
        arguments.update({key: value for key, value in choices.items() if value is not None})
        self.model = _make_model(model, pretrained, arguments)
        self.jacobian_weight = jacobian_weight
        self.jacobian_frequency = jacobian_frequency
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule = schedule

    def save_plain_hyperparameters(self, **arguments: Any) -> None:
        """Keep init arguments as plain data, so that checkpoints load under ``weights_only=True``."""
        self.save_hyperparameters(plain(arguments))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which classes made this run, so that ``cli.py test --ckpt_path`` needs nothing else."""
        classes = {"model": _class_path(self)}
        data: pl.LightningDataModule | None = getattr(self.trainer, "datamodule", None)
        if data is not None:
            classes["data"] = _class_path(data)
        checkpoint["deq_zoo_classes"] = classes
        hyper_parameters = checkpoint.get("hyper_parameters", {})
        if hyper_parameters.get("pretrained") is not None:
            # All weights are in the checkpoint: it says what the model is, and no longer needs what it started from.
            made_of = dict(zoo.spec_of(self.model).arguments)
            choices = {key: made_of.pop(key, None) for key in ("solver", "gradient")}
            arguments = {key: value for key, value in made_of.items() if key not in hyper_parameters}
            hyper_parameters.update(pretrained=None, model_args=arguments, **choices)

    def equilibria(self) -> dict[str, DEQ]:
        """The equilibrium layers of the model, by name in the log: ``""`` if there is one, else ``"<module>/"``."""
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, DEQ)}
        return {"": next(iter(layers.values()))} if len(layers) == 1 else {f"{k}/": v for k, v in layers.items()}

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

    def regularized(self, image: Tensor, stage: str) -> tuple[Any, Tensor]:
        """The model's output, and the Jacobian term of the loss: 0 where it is not asked for.

        Returns:
            the output and a scalar.
        """
        wanted = stage == "train" and self.jacobian_weight > 0
        if not wanted or float(torch.rand(())) >= self.jacobian_frequency:
            return self.model(image), image.new_zeros(())
        with one_draw(), self._calls_recorded() as calls:  # the penalty under the dropout masks of the solve
            output = self.model(image)
            penalty = torch.stack([jacobian_penalty(deq.cell, z, *inputs).mean() for deq, inputs, z in calls]).sum()
        self.log(f"{stage}/jacobian", penalty.detach())
        return output, self.jacobian_weight * penalty

    # --- diagnostics

    def observed(self, image: Tensor, stage: str, batch_index: int) -> Any:
        """The model's output. At the first batch of a stage the spectral radius of df/dz at z* is logged.

        That is the mean over the batch and over the calls of a layer: below 1 plain iteration converges there.
        """
        if batch_index > 0:
            return self.model(image)
        with self._calls_recorded() as calls:
            output = self.model(image)
        for name, layer in self.equilibria().items():
            start = torch.Generator().manual_seed(0)  # leaves the global stream alone
            found = [spectral_radius(deq.cell, z, *x, generator=start) for deq, x, z in calls if deq is layer]
            if found:
                key = f"{stage}/{name}spectral_radius"
                self.log(key, torch.stack(found).float().mean(), on_epoch=True, batch_size=1, sync_dist=True)
        return output

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

    def configure_optimizers(self) -> Any:
        """AdamW over the parameters that require gradients, with the schedule."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if self.schedule == "constant":
            return optimizer
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _class_path(thing: object) -> str:
    """Where the class is imported from: its package if it is public there, as configurations name it."""
    cls = type(thing)
    package = cls.__module__.partition(".")[0]
    public = getattr(sys.modules[package], cls.__name__, None) is cls
    return f"{package if public else cls.__module__}.{cls.__qualname__}"


def _make_model(model: str, pretrained: str | None, arguments: dict[str, Any]) -> nn.Module:
    if pretrained is None:
        return zoo.create_model(model, **arguments)
    found = zoo.load_pretrained(pretrained, **arguments)
    if (theirs := zoo.spec_of(found).model) != model:
        raise ValueError(
            f"pretrained={pretrained!r} are weights of model {theirs!r}, but model={model!r} was asked for"
        )
    return found.train()

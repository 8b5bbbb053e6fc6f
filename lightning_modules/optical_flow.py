"""Optical flow: where each pixel of one image is in the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

import zoo
from zoo import InputError
from zoo.flow import DEQFlow
from zoo.implicit import PhantomGradient, SolverReport, Trajectory
from zoo.implicit.solvers.base import is_count
from zoo.implicit.trajectory import fixed_point_correction
from zoo.video import FlowStream

from .base import EquilibriumModule
from .flow_metrics import FlowErrors
from .samples import moved, show

Batch = Sequence[Tensor]
Targets = tuple[Tensor, Tensor, Tensor | None]


class OpticalFlow(EquilibriumModule):
    """Optical flow with an equilibrium model: the fixed-point correction loss, and the published measures.

    The training loss is sum_k gamma^(n - 1 - k) mean(valid |flow_k - target|), over n states of the solve, the last of
    which is z* (Bai, Geng, Savani and Kolter, CVPR 2022, section 3.3). The mean is over both channels and all pixels,
    those too that are not valid, as published. Where the cell is unrolled the states are those after each application,
    or after n of them, as in RAFT (Teed and Deng, ECCV 2020). In validation and testing the loss is the term of z*.

    Logs ``{train,val,test}/loss`` and, of an epoch, the measures of :class:`FlowErrors`, ``/epe``, ``/1px``, ``/3px``,
    ``/f1_all``, ``/epe_per_image``, ``/epe_zero`` and where the data tell it ``/epe_visible`` and ``/epe_occluded``,
    beside the solver's statistics. The first samples of a validation are drawn: see show_every.

    Sequences are videos: each pair of neighbours is solved from the flow of the pair before, in training too (without a
    gradient from one to the next, and not while the cell is unrolled). In validation and testing the solver's
    statistics are those of a frame.
    Prediction of data that say that they are in order, by an attribute ``in_order``, in batches of one pair, does so
    as well, as long as each pair begins with the image with which the one before ended.

    Args:
        model: a name of ``zoo.list_models("deq_flow*")``.
        model_args: the model's arguments, plain numbers and words.
        gamma: how much less each earlier state weighs than the next one, in [0, 1].
        losses: n, at least 1. The states are ``max_steps // n`` updates apart, but for z*, which comes last.
        sliced: cut the solve at these states, as published: see :class:`~zoo.implicit.Trajectory`.
        max_flow: pixels that move by as many pixels, or by more, are not valid in the loss.
        freeze_batch_norm: leave the statistics of batch norms as they are, and normalise by them in training too.
        warm_start: in a video, start each solve where the one before ended.
        options: see :class:`EquilibriumModule`.

    Shape:
        batches are ``(image1, image2, flow, valid)`` or ``(image1, image2, flow, valid, occluded)``: images
        ``(B, 3, H, W)`` in [0, 1], flow ``(B, 2, H, W)`` in pixels, valid and occluded bool ``(B, H, W)``. Sequences
        are ``(frames (B, T, 3, H, W), flow (B, T-1, 2, H, W), valid (B, T-1, H, W), occluded (B, T-1, H, W))``.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self,
        model: str = "deq_flow_nano",
        model_args: dict[str, Any] | None = None,
        gamma: float = 0.8,
        losses: int = 6,
        sliced: bool = True,
        max_flow: float = 400.0,
        freeze_batch_norm: bool = False,
        warm_start: bool = True,
        **options: Any,
    ) -> None:
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma takes a number in [0, 1]; given: {gamma!r}")
        if not is_count(losses, 1):
            raise ValueError(f"losses takes an integer >= 1; given: {losses!r}")
        if not max_flow > 0:
            raise ValueError(f"max_flow takes a number > 0; given: {max_flow!r}")
        known = zoo.list_models(kind=DEQFlow)
        if model in zoo.list_models() and model not in known:
            raise ValueError(f"{model!r} is no model of optical flow; these are: {', '.join(known)}")
        super().__init__(model=model, model_args=model_args, **options)
        self.save_plain_hyperparameters(
            gamma=gamma,
            losses=losses,
            sliced=sliced,
            max_flow=max_flow,
            freeze_batch_norm=freeze_batch_norm,
            warm_start=warm_start,
        )
        deq = self._flow_model.deq
        if sliced and losses > 1 and deq.gradient.through_solver and deq.unrolled is None:
            raise ValueError(
                "sliced=True cuts the solve, and an unrolled gradient would know the last slice only: take another "
                f"gradient than {deq.gradient}, or sliced=False"
            )
        self.gamma = gamma
        self.losses = losses
        self.sliced = sliced
        self.max_flow = max_flow
        self.freeze_batch_norm = freeze_batch_norm
        if freeze_batch_norm:
            zoo.freeze_statistics(self.model)
        self.warm_start = warm_start
        self.train_errors, self.val_errors, self.test_errors = FlowErrors(), FlowErrors(), FlowErrors()
        self._stream: FlowStream | None = None
        self._last_frame: Tensor | None = None

    def forward(self, image1: Tensor, image2: Tensor) -> Tensor:
        """Two images ``(B, 3, H, W)`` in [0, 1] -> flow ``(B, 2, H, W)`` in pixels."""
        flow: Tensor = self.model(image1, image2)
        return flow

    # --- training

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The fixed-point correction loss plus the Jacobian term."""
        inputs, (target, valid, occluded) = self._inputs(batch)
        forward = self._states if len(inputs) == 2 else self._states_of_video
        flows, jacobian_term = self.regularized("train", *inputs, forward=forward)
        loss = fixed_point_correction(lambda flow: self._distance(flow, target, valid), flows, gamma=self.gamma)
        if loss.isfinite():  # else the step is skipped
            self.train_errors.update(flows[-1], target, valid, occluded)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(target))
        return loss + jacobian_term

    def _states(self, image1: Tensor, image2: Tensor) -> list[Tensor]:
        """The flows of the states that are in the loss, that of z* last."""
        model = self._flow_model
        if (trajectory := self._trajectory()) is None:
            return [model(image1, image2)]
        return cast(list[Tensor], model(image1, image2, trajectory=trajectory))

    def _states_of_video(self, frames: Tensor) -> list[Tensor]:
        """The same of all pairs of neighbours, one sequence after another.

        Each is solved from where a video's solve would start. An unrolled cell takes all of them at once, from rest.
        """
        model, trajectory = self._flow_model, self._trajectory()
        B, T, _, *size = frames.shape
        model.check_images(frames[:, 0], frames[:, 1])
        features = model.features(frames.flatten(0, 1)).unflatten(0, (B, T))
        contexts = model.context(frames[:, :-1].flatten(0, 1)).unflatten(0, (B, T - 1))
        F1, F2 = features[:, :-1], features[:, 1:]
        if model.deq.unrolled is not None or not self.warm_start:
            F1, F2, contexts = (x.flatten(0, 1) for x in (F1, F2, contexts))
            states = model.solved(F1, F2, contexts, trajectory=trajectory)
            return [model.upsampled(state, size) for state in states]
        start, flows, reports = None, [], []
        for t in range(T - 1):
            states = model.solved(F1[:, t], F2[:, t], contexts[:, t], start, trajectory)
            flows.append([model.upsampled(state, size) for state in states])
            reports.append(cast(SolverReport, model.deq.report))
            start = model.next_start(states[-1])
        model.deq.report = _joined(reports)
        return [torch.stack(of_pairs, dim=1).flatten(0, 1) for of_pairs in zip(*flows, strict=True)]

    def _trajectory(self) -> Trajectory | None:
        """Which states are in the loss besides z*."""
        deq = self._flow_model.deq
        steps = deq.solver.max_steps if deq.unrolled is None else deq.unrolled
        apart = max(1, steps // self.losses)
        before = [apart * k for k in range(1, self.losses) if apart * k < steps]
        if not before:
            return None
        gradient = PhantomGradient() if deq.gradient.through_solver else deq.gradient
        return Trajectory(before, gradient, sliced=self.sliced and deq.unrolled is None)

    def _distance(self, flow: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """mean(valid |flow - target|), over both channels and all pixels."""
        counts = valid & (target.square().sum(dim=1) < self.max_flow**2)
        return (flow - target).abs().where(counts.unsqueeze(1), 0).mean()

    # --- evaluation

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and measures; the first batch is drawn."""
        self._evaluate("val", self.val_errors, batch, batch_index)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and measures."""
        self._evaluate("test", self.test_errors, batch, batch_index)

    def predict_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        """The flow from the first to the second image, ``(B, 2, H, W)``."""
        if batch[0].dim() == 5:
            raise InputError(
                "OpticalFlow predicts of pairs of images, and was given sequences, frames of shape "
                f"{tuple(batch[0].shape)}: give it pairs (--data.frames 2)"
            )
        image1, image2 = batch[:2]
        in_order = getattr(getattr(self.trainer, "datamodule", None), "in_order", False)
        if not (in_order and self.warm_start and len(image1) == 1):
            return {"flow": self(image1, image2)}
        if self._stream is None or self._last_frame is None or not torch.equal(self._last_frame, image1):
            self._stream = self._flow_model.stream()
            self._stream(image1)
        flow, self._last_frame = self._stream(image2), image2
        return {"flow": cast(Tensor, flow)}

    def on_predict_end(self) -> None:
        """Forget the video."""
        self._stream = self._last_frame = None

    def _evaluate(self, stage: str, errors: FlowErrors, batch: Batch, batch_index: int) -> None:
        inputs, (target, valid, occluded) = self._inputs(batch)
        image, *second = inputs
        if second:
            flow = self.observed(stage, batch_index, image, *second)
        else:
            flow = self.observed(stage, batch_index, image, forward=self._video).flatten(0, 1)
            image = image[:, :-1].flatten(0, 1)
        errors.update(flow, target, valid, occluded)
        loss = self._distance(flow, target, valid)
        self.log(f"{stage}/loss", loss, on_epoch=True, prog_bar=True, batch_size=len(image), sync_dist=True)
        if self.shows(stage, batch_index):
            known = target.where(valid.unsqueeze(1), 0)
            show(self.trainer, "val/flow", lambda: moved(image, known, flow))

    def _video(self, frames: Tensor) -> Tensor:
        """The flow from each frame to the next, ``(B, T - 1, 2, H, W)``; the layer's report is of all the solves."""
        deq = self._flow_model.deq
        stream = self._flow_model.stream(warm_start=self.warm_start)
        flows, reports = [], []
        for frame in frames.unbind(dim=1):
            flow = stream(frame)
            if flow is not None:
                flows.append(flow)
                reports.append(cast(SolverReport, deq.report))
        deq.report = _joined(reports)
        return torch.stack(flows, dim=1)

    # --- measures of an epoch

    def on_train_epoch_start(self) -> None:
        """Count anew."""
        self.train_errors.reset()

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self.val_errors.reset()

    def on_test_epoch_start(self) -> None:
        """Count anew."""
        self.test_errors.reset()

    def on_train_epoch_end(self) -> None:
        """Log the measures of the epoch, unless the run went on from its end: nothing was measured here then."""
        if self.train_errors.update_called:
            self._log_errors("train", self.train_errors.compute())

    def on_validation_epoch_end(self) -> None:
        """Log the measures of the epoch."""
        self._log_errors("val", self.val_errors.compute())

    def on_test_epoch_end(self) -> None:
        """Log the measures of the epoch."""
        self._log_errors("test", self.test_errors.compute())

    def _log_errors(self, stage: str, errors: Mapping[str, Tensor]) -> None:
        """They are alike in all processes, and the mean over them, without which Lightning warns, changes nothing."""
        for name, value in errors.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "epe", sync_dist=True)

    # --- what batches are

    @property
    def _flow_model(self) -> DEQFlow:
        return cast(DEQFlow, self.model)

    def _inputs(self, batch: Batch) -> tuple[tuple[Tensor, ...], Targets]:
        """Two images, or the frames of sequences; and what is known of all pairs, one sequence after another."""
        first, *rest = batch
        if first.dim() == 5:
            (B, T), size = first.shape[:2], first.shape[3:]
            if T < 2:
                raise InputError(f"sequences have two frames or more; given: frames of shape {tuple(first.shape)}")
            flow, valid, occluded = self._targets((B, T - 1), size, rest)
            return (first,), (
                flow.flatten(0, 1), valid.flatten(0, 1), None if occluded is None else occluded.flatten(0, 1)
            )  # fmt: skip
        if not rest:
            raise InputError(
                "a batch of OpticalFlow is (image1, image2, flow, valid), or the same with occluded; given: one tensor "
                f"of shape {tuple(first.shape)}"
            )
        second, *rest = rest
        return (first, second), self._targets(first.shape[:1], first.shape[2:], rest)

    @staticmethod
    def _targets(rows: Sequence[int], size: Sequence[int], given: Batch) -> Targets:
        """The flow, where it is known and finite, and what is occluded, if that is given.

        Raises:
            InputError: there are fewer or more of them, or one has another shape or dtype than it should.
        """
        if len(given) not in (2, 3):
            raise InputError(
                "after its images a batch of OpticalFlow has flow and valid, or flow, valid and occluded; given: "
                f"{len(given)} tensors"
            )
        flow, *masks = given
        wanted = (*rows, 2, *size)
        if flow.shape != wanted or not flow.is_floating_point():
            raise InputError(
                f"flow is floating, (u, v) of each pixel, here of shape {wanted}; given: {flow.dtype} of shape "
                f"{tuple(flow.shape)}"
            )
        for name, mask in zip(("valid", "occluded"), masks, strict=False):
            if mask.shape != (*rows, *size) or mask.dtype != torch.bool:
                raise InputError(
                    f"{name} is bool, one a pixel, here of shape {(*rows, *size)}; given: {mask.dtype} of shape "
                    f"{tuple(mask.shape)}"
                )
        finite = flow.isfinite().all(dim=-3)
        return flow.where(finite.unsqueeze(-3), 0), masks[0] & finite, masks[1] if len(masks) == 2 else None


def _joined(reports: Sequence[SolverReport]) -> SolverReport:
    """The report of several solves, as if their samples had been solved together."""
    return replace(
        reports[-1],
        residual=torch.cat([report.residual for report in reports]),
        steps=torch.cat([report.steps for report in reports]),
        converged=torch.cat([report.converged for report in reports]),
        status=torch.cat([report.status for report in reports]),
        evaluations=sum(report.evaluations for report in reports),
        row_evaluations=sum(report.row_evaluations for report in reports),
        trace=None,
    )

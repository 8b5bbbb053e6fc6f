"""OpticalFlow: its loss by hand, its measures, videos, frozen batch norms, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_modules.base
import zoo
from lightning_modules import OpticalFlow
from lightning_modules.flow_metrics import FlowErrors
from tests.command_line import same
from tests.lightning_modules.flows import SMALL, batch_of, pairs, sequences, small
from tests.lightning_modules.runs import Steps, gradients, train, trainer
from zoo.implicit import (
    FixedPointIteration,
    ImplicitGradient,
    NeumannGradient,
    PhantomGradient,
    Trajectory,
    UnrolledGradient,
)


def term(flow: Tensor, batch: list[Tensor], max_flow: float = 400.0) -> Tensor:
    """mean(valid |flow - target|) of one state, as published: over all pixels and both channels."""
    _, _, target, valid, *_ = batch
    counts = valid & (target[:, 0] ** 2 + target[:, 1] ** 2 < max_flow**2)
    return (counts.float().unsqueeze(1) * (flow - target).abs()).sum() / target.numel()


def agree(found: dict[str, Tensor], module: OpticalFlow, loss: Tensor) -> None:
    """The step's loss and gradients are these."""
    torch.testing.assert_close(found["loss"], loss.detach())
    names = [name for name, _ in module.named_parameters()]
    expected = torch.autograd.grad(loss, list(module.parameters()))
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    ("losses", "max_steps", "steps"), [(3, 6, [2, 4]), (6, 6, [1, 2, 3, 4, 5]), (9, 3, [1, 2]), (4, 7, [1, 2, 3])]
)
@pytest.mark.parametrize("sliced", [True, False])
def test_the_loss_is_that_of_states_of_the_solve(losses: int, max_steps: int, steps: list[int], sliced: bool) -> None:
    batch = batch_of(pairs(2))
    solver = FixedPointIteration(tol=1e-9, norm="absolute", max_steps=max_steps)
    gradient = PhantomGradient(steps=2)
    module = small(losses=losses, sliced=sliced, gamma=0.6, solver=solver, gradient=gradient)
    found = gradients(module, batch)
    flows = module.model(*batch[:2], trajectory=Trajectory(steps, gradient, sliced=sliced))
    assert len(flows) == len(steps) + 1
    terms = [0.6 ** (len(steps) - k) * term(flow, batch) for k, flow in enumerate(flows)]
    agree(found, module, torch.stack(terms).sum())


@pytest.mark.parametrize("gradient", [NeumannGradient(1), ImplicitGradient(FixedPointIteration(max_steps=2))])
def test_the_states_have_the_gradient_of_the_layer(gradient: Any) -> None:
    batch = batch_of(pairs(2))
    module = small(gradient=gradient, sliced=False)
    found = gradients(module, batch)
    flows = module.model(*batch[:2], trajectory=Trajectory([2, 4], gradient))
    agree(found, module, torch.stack([0.8 ** (2 - k) * term(flow, batch) for k, flow in enumerate(flows)]).sum())


def test_an_unrolled_gradient_has_states_with_a_phantom() -> None:
    batch = batch_of(pairs(2))
    module = small(gradient=UnrolledGradient(), sliced=False)
    found = gradients(module, batch)
    flows = module.model(*batch[:2], trajectory=[2, 4])
    agree(found, module, torch.stack([0.8 ** (2 - k) * term(flow, batch) for k, flow in enumerate(flows)]).sum())


def test_one_loss_is_that_of_the_equilibrium() -> None:
    batch = batch_of(pairs(2))
    module = small(losses=1)
    agree(gradients(module, batch), module, term(module.model(*batch[:2]), batch))


@pytest.mark.parametrize(("losses", "applications"), [(9, [1, 2, 3, 4, 5]), (2, [2, 5])])
@pytest.mark.parametrize("pretraining", [True, False])
def test_an_unrolled_cell_has_the_loss_of_raft(losses: int, applications: list[int], pretraining: bool) -> None:
    """Of the states after each application, or equally spaced ones; all of it backpropagated through."""
    batch = batch_of(pairs(2))
    options: dict[str, Any] = {"pretrain_steps": 1, "pretrain_depth": 5} if pretraining else {}
    module = small(None if pretraining else {"unrolled": 5}, losses=losses, **options)
    found = gradients(module, batch)
    model = module.model
    F1, F2 = model.features(batch[0]), model.features(batch[1])
    inputs = model.injection(F1, F2, model.context(batch[0]))
    z, flows = model.deq.cell.initial_state(*inputs), {}
    for k in range(1, 6):
        z = model.deq.cell(z, *inputs)
        flows[k] = model.upsampled(zoo.video.FlowState(*z), batch[0].shape[2:])
    weights = [0.8 ** (len(applications) - 1 - k) for k in range(len(applications))]
    terms = [weight * term(flows[k], batch) for weight, k in zip(weights, applications, strict=True)]
    agree(found, module, torch.stack(terms).sum())


@pytest.mark.parametrize("warm_start", [True, False])
def test_sequences_are_trained_on_from_where_the_pair_before_ended(warm_start: bool) -> None:
    """The loss is the mean of that of all pairs, without a gradient from one pair to the next."""
    batch = batch_of(sequences(count=2, frames=3))
    module = small(warm_start=warm_start, gradient=PhantomGradient(), sliced=False)
    found = gradients(module, batch)
    frames, target, valid, _ = batch
    model, start, losses = module.model, None, []
    model.context_encoder.train()
    # BatchNorm sees the contexts of all pairs of the batch at once
    contexts = model.context(frames[:, :-1].flatten(0, 1)).unflatten(0, (2, 2))
    for t in range(2):
        F1, F2 = model.features(frames[:, t]), model.features(frames[:, t + 1])
        states = model.solved(F1, F2, contexts[:, t], start, Trajectory([2, 4], PhantomGradient()))
        pair = [frames[:, t], frames[:, t + 1], target[:, t], valid[:, t]]
        flows = [model.upsampled(state, frames.shape[3:]) for state in states]
        losses.append(sum(0.8 ** (2 - k) * term(flow, pair) for k, flow in enumerate(flows)))
        if warm_start:
            start = model.next_start(states[-1])
    agree(found, module, torch.stack(losses).mean())


def test_pairs_of_sequences_are_alike_while_the_cell_is_unrolled() -> None:
    frames, target, valid, occluded = batch_of(sequences(count=2, frames=3))
    found = gradients(small(pretrain_steps=1, pretrain_depth=3), [frames, target, valid, occluded])
    known = (x.flatten(0, 1) for x in (target, valid, occluded))
    pairs = [frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1), *known]
    expected = gradients(small(pretrain_steps=1, pretrain_depth=3), pairs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_fast_pixels_are_left_out() -> None:
    batch = batch_of(pairs(2))
    batch[3].fill_(True)
    batch[2][:, :, :3] = 300.0  # 424 pixels
    batch[2][:, :, 3:5] = 5.0
    found = [gradients(small(losses=1, max_flow=most), batch)["loss"] for most in (400.0, 7.0, 500.0)]
    flow = small().model(*batch[:2])
    for value, most in zip(found, (400.0, 7.0, 500.0), strict=True):
        torch.testing.assert_close(value, term(flow, batch, most).detach(), rtol=1e-4, atol=1e-6)
    assert found[1] < found[0] < found[2]


def test_a_batch_of_which_nothing_is_known_teaches_nothing() -> None:
    image1, image2, flow, valid, _ = batch_of(pairs(2))
    found = gradients(small(), (image1, image2, flow * float("nan"), valid & False))
    assert all((value == 0).all() for value in found.values())


def test_the_jacobian_term_comes_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cell is unrolled."""
    batch = batch_of(pairs(2))
    monkeypatch.setattr(lightning_modules.base, "jacobian_penalty", lambda *_, **__: torch.full((2,), 3.0))
    for options in ({}, {"pretrain_steps": 1, "pretrain_depth": 2, "jacobian_pretrain_weight": 0.5}):
        without = gradients(small(**{**options, "jacobian_pretrain_weight": 0.0}), batch)["loss"]
        found = gradients(small(jacobian_weight=0.5, **options), batch)["loss"]
        torch.testing.assert_close(found, without + 1.5)


def test_the_jacobian_term_is_differentiated() -> None:
    batch = batch_of(pairs(2))
    torch.manual_seed(0)
    found = gradients(small(jacobian_weight=1.0), batch)
    without = gradients(small(), batch)
    assert found["loss"] > without["loss"]
    name = "model.deq.cell.update_block.recurrent_block.convgru1.convz.parametrizations.weight.original1"
    assert found[name].isfinite().all()
    assert not torch.allclose(found[name], without[name])


# ---------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("occluded", [True, False])
def test_what_is_logged_is_counted_by_hand(stage: str, occluded: bool) -> None:
    """Over an epoch of batches of different sizes."""
    data = pairs(occluded=occluded)
    image1, image2, target, valid, *more = data.tensors
    module = small().eval()
    run = getattr(trainer(), "validate" if stage == "val" else "test")
    (measured,) = run(module, DataLoader(data, batch_size=3), verbose=False)
    errors = FlowErrors()
    with torch.no_grad():
        flow = module(image1, image2)
    errors.update(flow, target, valid, *more)
    expected = {f"{stage}/{name}": value.item() for name, value in errors.compute().items()}
    assert (f"{stage}/epe_occluded" in expected) is occluded
    solver = {f"{stage}/{name}" for name in ("loss", "steps", "residual", "converged", "spectral_radius")}
    assert set(measured) == solver | set(expected)
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert measured[f"{stage}/loss"] == pytest.approx(term(flow, list(data.tensors)).item(), rel=1e-5)


def test_training_is_logged_too_and_each_epoch_counts_anew(tmp_path: Path) -> None:
    steps, loader = Steps(), DataLoader(pairs(), batch_size=3)
    run = train(small(lr=0.0), loader=loader, max_epochs=2, logger=steps, default_root_dir=tmp_path)
    assert len(steps.logged) == 4
    assert steps.logged[0]["train/loss"] == steps.logged[2]["train/loss"] > 0
    found = run.callback_metrics
    zero = pairs().tensors[2].norm(dim=1)[pairs().tensors[3]].mean()
    assert found["train/epe_zero"].item() == pytest.approx(zero.item(), rel=1e-5)
    assert found["val/epe_zero"] == found["train/epe_zero"]
    assert found["train/epe"] > 0


def test_a_small_model_learns_a_shift(tmp_path: Path) -> None:
    """Images that all move alike; a checkpoint keeps what was learnt, and all arguments."""
    generator = torch.Generator().manual_seed(0)
    image = nn.functional.avg_pool2d(torch.rand(6, 3, 20, 28, generator=generator), 3, 1)
    flow = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(6, 2, 16, 24).clone()
    valid = torch.ones(6, 16, 24, dtype=torch.bool)
    data = TensorDataset(image[:, :, 1:17, 2:26], image[:, :, 2:18, :24], flow, valid)
    loader = DataLoader(data, batch_size=3)
    module = small(lr=0.02, schedule="one_cycle", freeze_batch_norm=True, gamma=0.7, max_flow=50.0)
    run = train(module, loader=loader, max_epochs=12, limit_val_batches=0)
    (after,) = run.test(module, loader, verbose=False)
    assert after["test/epe"] < 0.5 * after["test/epe_zero"]
    run.save_checkpoint(tmp_path / "mine.ckpt", weights_only=False)
    again = OpticalFlow.load_from_checkpoint(tmp_path / "mine.ckpt", weights_only=True)
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    assert dict(again.hparams) == dict(module.hparams)
    assert (again.gamma, again.max_flow, again.losses, again.freeze_batch_norm) == (0.7, 50.0, 3, True)
    assert again.model.deq.solver == module.model.deq.solver


def test_a_validation_is_drawn_once_an_epoch(tmp_path: Path) -> None:
    """Not in the sanity check before the first."""
    loader = DataLoader(pairs(4), batch_size=1)
    log = CSVLogger(tmp_path, name="mine", version=0)
    train(small(), loader=loader, max_epochs=2, logger=log, num_sanity_val_steps=1)
    drawn = sorted(path.name for path in (tmp_path / "mine" / "version_0" / "pictures").glob("val_flow*"))
    assert drawn == ["val_flow_000004.png", "val_flow_000008.png"]


# ------------------------------------------------------------------------------------------------------------ videos


@pytest.mark.parametrize("warm_start", [True, False])
def test_sequences_are_videos(warm_start: bool) -> None:
    """Measures are of all pairs, and solver statistics of a frame."""
    data = sequences()
    frames, target, valid, occluded = data.tensors
    module = small(warm_start=warm_start, solver=FixedPointIteration(tol=0.05, norm="absolute", max_steps=40)).eval()
    (measured,) = trainer().test(module, DataLoader(data, batch_size=2), verbose=False)
    stream, steps, errors = module.model.stream(warm_start), [], FlowErrors()
    for t, frame in enumerate(frames.unbind(1)):
        flow = stream(frame)
        if flow is not None:
            steps.append(module.model.deq.report.steps.float().mean())
            errors.update(flow, target[:, t - 1], valid[:, t - 1], occluded[:, t - 1])
    assert measured["test/steps"] == pytest.approx(torch.stack(steps).mean().item())
    for name, value in errors.compute().items():
        assert measured[f"test/{name}"] == pytest.approx(value.item(), rel=1e-5), name
    assert module.model.deq.report.steps.shape == (2,), "of the last frame; that of the test was of all"


def test_a_video_that_starts_warm_is_another(tmp_path: Path) -> None:
    loader = DataLoader(sequences(), batch_size=2)
    log = CSVLogger(tmp_path)
    cold, warm = (
        trainer(logger=log).validate(small(warm_start=warm), loader, verbose=False)[0] for warm in (False, True)
    )
    assert cold["val/epe"] != warm["val/epe"]
    assert cold["val/epe_zero"] == warm["val/epe_zero"]
    assert list(tmp_path.rglob("val_flow_000000.png")), "and is drawn as well"


class InOrder(pl.LightningDataModule):
    """Pairs of the frames of videos."""

    def __init__(self, *videos: Tensor, batch_size: int = 1, in_order: bool = True) -> None:
        super().__init__()
        self.in_order = in_order
        self.pairs = [(frames[t], frames[t + 1]) for frames in videos for t in range(len(frames) - 1)]
        self.batch_size = batch_size

    def predict_dataloader(self) -> Any:
        return DataLoader(self.pairs, batch_size=self.batch_size)  # type: ignore[arg-type]


def test_frames_in_order_are_predicted_as_a_video() -> None:
    """Where another video begins, it begins from rest; and so does each pair where frames are in no order."""
    videos = torch.rand(2, 4, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    module = small().eval()
    warm, cold = (torch.cat([module.model.video(v.unsqueeze(0), warm)[0] for v in videos]) for warm in (True, False))
    assert (warm - cold).abs().max() > 1e-3

    def predicted(module: OpticalFlow, **arguments: Any) -> Tensor:
        module.model.deq.on_failure = "ignore"
        batches = trainer().predict(module, datamodule=InOrder(*videos, **arguments))
        return torch.cat([batch["flow"] for batch in batches])

    for _ in range(2):
        torch.testing.assert_close(predicted(module), warm)
    torch.testing.assert_close(predicted(module, in_order=False), cold, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predicted(module, batch_size=2), cold, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predicted(small(warm_start=False)), cold, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- batch norms


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norms_do_not_move(frozen: bool) -> None:
    module = small(freeze_batch_norm=frozen, lr=0.01)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(layers) > 5
    before = [layer.running_mean.clone() for layer in layers]
    weights = [layer.weight.detach().clone() for layer in layers]
    module.train()
    assert not any(layer.training is frozen for layer in layers)
    assert module.model.training
    module.model.train()  # which the module is not asked about
    train(module, loader=DataLoader(pairs(), batch_size=3))
    for layer, mean, weight in zip(layers, before, weights, strict=True):
        assert torch.equal(layer.running_mean, mean) is frozen
        assert not torch.equal(layer.weight, weight), "the statistics stand still, the weights do not"


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a, b, f, v: (a, b, f),
            "after its images a batch of OpticalFlow has flow and valid, .*given: 1 tensors",
        ),
        (
            lambda a, b, f, v: (a, b, f[:, :1], v),
            r"flow is floating.*of shape \(2, 2, 16, 24\); given: torch.float32 of",
        ),
        (lambda a, b, f, v: (a, b, f.int(), v), r"flow is floating.*; given: torch.int32 of shape \(2, 2, 16, 24\)"),
        (lambda a, b, f, v: (a, b, f, v[:, None]), r"valid is bool.*\(2, 16, 24\); given: torch.bool of shape \(2, 1,"),
        (lambda a, b, f, v: (a, b, f, v.float()), r"valid is bool, one a pixel, .*; given: torch.float32 of shape"),
        (
            lambda a, b, f, v: (a, b, f, v, v[:1]),
            r"occluded is bool, one a pixel, .*given: torch.bool of shape \(1, 16",
        ),
        (lambda a, b, f, v: (a[:, :1], b[:, :1], f, v), r"DEQFlow takes images \(B, 3, H, W\)"),
    ],
)
def test_batches_that_do_not_fit(change: Any, message: str) -> None:
    batch = change(*batch_of(pairs(2, occluded=False)))
    with pytest.raises(zoo.InputError, match=message):
        gradients(small(), batch)
    with pytest.raises(zoo.InputError, match=message):
        trainer().validate(small(), DataLoader([0], collate_fn=lambda _: batch), verbose=False)


def test_sequences_are_not_predicted() -> None:
    message = r"given sequences, frames of shape \(2, 4, 3, 16, 24\): give it pairs \(--data.frames 2\)"
    with pytest.raises(zoo.InputError, match=f"predicts of pairs of images, and was {message}"):
        small().predict_step(batch_of(sequences()), 0)


def test_a_sequence_has_two_frames() -> None:
    frames, flow, *masks = batch_of(sequences())
    with pytest.raises(zoo.InputError, match="two frames or more; given: frames of shape"):
        gradients(small(), [frames[:, :1], flow[:, :0], *(mask[:, :0] for mask in masks)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "mdeq_nano"}, "'mdeq_nano' is no model of optical flow; these are: deq_flow, deq_flow_base, deq_"),
        ({"model": "deq_flow_nanno"}, "unknown model 'deq_flow_nanno'. Did you mean 'deq_flow_nano'"),
        ({"gamma": 1.5}, r"gamma takes a number in \[0, 1\]; given: 1.5"),
        ({"losses": 0}, "losses takes an integer >= 1; given: 0"),
        ({"max_flow": 0.0}, "max_flow takes a number > 0; given: 0.0"),
        ({"gradient": UnrolledGradient(), "model_args": SMALL}, "sliced=True cuts the solve.*or sliced=False"),
    ],
)
def test_mistakes_are_refused_where_they_are_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpticalFlow(**arguments)

"""ImageClassifier in a script, with a plain Trainer: learning, logging, checkpoints, regularisation, schedules."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import zoo
from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier
from tests.command_line import same
from tests.lightning_modules.runs import Rates, batches, parameters, small, train, trained, trainer
from tests.toy_weights import publish
from zoo.implicit import Anderson, ConvergenceWarning, ImplicitGradient, Newton, PhantomGradient, UnrolledGradient

CHOICES: dict[str, Any] = {"solver": Newton(tol=1e-3), "gradient": ImplicitGradient(Anderson(tol=1e-3, memory=4))}


# ----------------------------------------------------------------------------------------------------------- learning


def test_it_learns_the_digits() -> None:
    data = DigitsDataModule(augment=False)
    module = small(model_args={"width": 32, "contraction": 0.9}, lr=1e-2)
    pl.seed_everything(0)
    run = trainer(max_epochs=6)
    run.fit(module, datamodule=data)
    (measured,) = run.test(module, datamodule=data, verbose=False)
    assert measured["test/accuracy"] > 0.9
    assert measured["test/converged"] == 1


def test_what_is_logged_is_what_the_solves_report() -> None:
    """The means over samples, whatever the sizes of the batches."""
    module = small()
    loader = DataLoader(batches().dataset, batch_size=60)  # 60 and 20
    (measured,) = trainer().validate(module, loader, verbose=False)
    images, labels = loader.dataset.tensors
    with torch.no_grad():
        logits = module.model(images)
    report = module.model.deq.report
    assert set(measured) == {
        f"val/{key}" for key in ("loss", "accuracy", "steps", "residual", "converged", "spectral_radius")
    }
    x = module.model.injection(images[:60].flatten(1))
    with torch.no_grad():
        z, _ = module.model.deq(x)
    J = module.model.deq.cell.jacobian(z, x)
    radius = torch.linalg.eigvals(J[:4]).abs().amax(dim=1).mean().item()  # of the first samples
    assert measured["val/spectral_radius"] == pytest.approx(radius, rel=1e-4)
    assert measured["val/steps"] == pytest.approx(report.steps.float().mean().item(), rel=1e-6)
    assert measured["val/residual"] == pytest.approx(report.residual.mean().item(), rel=1e-5)
    assert measured["val/converged"] == 1
    assert measured["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert measured["val/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), rel=1e-6)


def test_a_training_step_logs_both_solves() -> None:
    module, logged = trained()
    for values in logged:
        assert {"train/loss", "train/steps", "train/residual", "train/converged", "train/adjoint_steps"} <= set(values)
        assert "train/jacobian" not in values
    assert logged[-1]["train/steps"] == module.model.deq.report.steps.float().mean()
    assert logged[-1]["train/adjoint_steps"] == module.model.deq.adjoint_report.steps.float().mean() > 0
    _, unrolled = trained(gradient=UnrolledGradient())
    assert all("train/adjoint_steps" not in values for values in unrolled)


def test_a_solve_that_fails_is_said_and_logged() -> None:
    module = small(solver=Anderson(tol=1e-12, max_steps=2))
    with pytest.warns(ConvergenceWarning, match="did not converge for every sample"):
        (measured,) = trainer().test(module, batches(), verbose=False)
    assert (measured["test/converged"], measured["test/steps"]) == (0, 2)


def test_label_smoothing_is_for_training_only() -> None:
    image, label = next(iter(batches()))
    module = small(label_smoothing=0.2)
    _, logged = trained(label_smoothing=0.2)
    expected = F.cross_entropy(module(image), label, label_smoothing=0.2).item()
    assert logged[0]["train/loss"] == pytest.approx(expected, rel=1e-6)
    (measured,) = trainer().validate(module, batches(1), verbose=False)
    assert measured["val/loss"] == pytest.approx(F.cross_entropy(module(image), label).item(), rel=1e-6)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_top_5_where_there_are_more_than_10_classes(stage: str) -> None:
    images, labels = batches().dataset.tensors
    loader = DataLoader(TensorDataset(images, (labels * 7 + images[:, 0, 0, 0].gt(0.5)) % 12), batch_size=30)
    module = small(num_classes=12)
    (measured,) = getattr(trainer(), "validate" if stage == "val" else "test")(module, loader, verbose=False)
    with torch.no_grad():
        best = module(images).topk(5).indices
    hits = best == loader.dataset.tensors[1].unsqueeze(1)
    assert measured[f"{stage}/accuracy_top5"] == pytest.approx(hits.any(dim=1).float().mean().item(), rel=1e-6)
    assert measured[f"{stage}/accuracy"] == pytest.approx(hits[:, 0].float().mean().item(), rel=1e-6)
    assert 0 < measured[f"{stage}/accuracy"] < measured[f"{stage}/accuracy_top5"] < 1


@pytest.mark.parametrize("labelled", [True, False])
def test_predictions_with_and_without_labels(labelled: bool) -> None:
    module, (image, label) = small(), next(iter(batches()))
    (predicted,) = trainer().predict(module, batches(1) if labelled else DataLoader(image, batch_size=20))
    with torch.no_grad():
        probability = module(image).softmax(1)
    expected = {"prediction": probability.argmax(1), "probability": probability.amax(1)}
    assert same(predicted, {**expected, "label": label} if labelled else expected)


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("choices", [{}, CHOICES], ids=["default", "objects"])
def test_a_checkpoint_is_plain_data_and_makes_the_module_again(tmp_path: Path, choices: dict[str, Any]) -> None:
    module = small(label_smoothing=0.1, jacobian_weight=0.5, **choices)
    run = train(module)
    run.save_checkpoint(tmp_path / "mine.ckpt", weights_only=False)
    content = torch.load(tmp_path / "mine.ckpt", weights_only=True)
    assert content["deq_zoo_classes"] == {"model": "lightning_modules.ImageClassifier"}
    plain = content["hyper_parameters"]
    assert plain["solver"] == (
        {
            "class_path": "zoo.implicit.Newton",
            "init_args": {"tol": 1e-3, "norm": "relative", "max_steps": 50, "compact": False, "bfloat16_until": None},
        }
        if choices
        else None
    )
    again = ImageClassifier.load_from_checkpoint(tmp_path / "mine.ckpt", weights_only=True)
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    assert (again.model.deq.solver, again.model.deq.gradient) == (module.model.deq.solver, module.model.deq.gradient)
    assert (again.label_smoothing, again.jacobian_weight, again.lr) == (0.1, 0.5, 1e-3)
    assert dict(again.hparams) == dict(module.hparams) == plain


def test_a_checkpoint_names_its_data_where_it_is_a_datamodule(tmp_path: Path) -> None:
    run = trainer(max_steps=1)
    run.fit(small(), datamodule=DigitsDataModule(batch_size=50))
    run.save_checkpoint(tmp_path / "mine.ckpt", weights_only=False)
    content = torch.load(tmp_path / "mine.ckpt", weights_only=True)
    assert content["deq_zoo_classes"]["data"] == "datamodules.DigitsDataModule"
    assert content["datamodule_hyper_parameters"]["batch_size"] == 50


def test_plain_descriptions_and_names_are_choices_too() -> None:
    by_name = small(solver="Newton", gradient="PhantomGradient")
    described = small(
        solver={"class_path": "zoo.implicit.Newton"},
        gradient={"class_path": "PhantomGradient", "init_args": {"steps": 1}},
    )
    for module in (by_name, described):
        assert (module.model.deq.solver, module.model.deq.gradient) == (Newton(), PhantomGradient())
    in_model_args = ImageClassifier(model_args={"width": 6, "solver": Newton()})
    assert in_model_args.model.deq.solver == Newton()


# ----------------------------------------------------------------------------------------------------- regularisation


def test_the_jacobian_term_is_logged_and_changes_the_gradients() -> None:
    image, label = next(iter(batches()))
    gradients = []
    for weight in (0.0, 2.0):
        module = small(jacobian_weight=weight, model_args={"width": 6})
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        torch.manual_seed(5)
        module.training_step((image, label), 0).backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
    for name in ("model.deq.cell.linear.weight", "model.injection.weight"):
        assert (gradients[0][name] - gradients[1][name]).norm() > 0.01 * gradients[0][name].norm()
    # The penalty is a function of z*, W and x: the classifier is none of them.
    torch.testing.assert_close(gradients[0]["model.classifier.weight"], gradients[1]["model.classifier.weight"])


def test_the_jacobian_term_is_the_penalty_of_the_backbone() -> None:
    image, label = next(iter(batches()))
    module = small(jacobian_weight=3.0)
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    torch.manual_seed(5)
    loss = module.training_step((image, label), 0)
    torch.manual_seed(5)
    with torch.no_grad():
        x = module.model.injection(image.flatten(1))
        z, _ = module.model.deq(x)
    penalty = zoo.implicit.jacobian_penalty(module.model.deq.cell, z, x).mean()
    torch.testing.assert_close(logged["train/jacobian"], penalty.detach())
    torch.testing.assert_close(loss.detach(), logged["train/loss"] + 3 * penalty.detach())


def test_the_jacobian_term_shrinks_the_jacobian() -> None:
    free, _ = trained(lr=0.05)
    regularized, logged = trained(lr=0.05, jacobian_weight=20.0)
    norms = [m.model.deq.cell.linear.weight.norm().item() for m in (free, regularized)]
    assert norms[1] < 0.95 * norms[0]
    assert all(values["train/jacobian"] > 0 for values in logged)


@pytest.mark.parametrize(("frequency", "how_often"), [(0.0, 0), (1.0, 4)])
def test_the_extreme_frequencies(frequency: float, how_often: int) -> None:
    pl.seed_everything(0)
    module, logged = trained(jacobian_weight=1.0, jacobian_frequency=frequency)
    assert sum("train/jacobian" in values for values in logged) == how_often
    plain, _ = trained()
    assert same(parameters(module), parameters(plain)) == (how_often == 0)


def test_a_frequency_between_is_a_fraction_of_the_steps() -> None:
    """The same steps for the same seed, whatever was drawn before them: on every rank, and after a resumption."""
    module = small(jacobian_weight=1.0, jacobian_frequency=0.25)
    found = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        torch.rand(len(found))
        found.append([module.jacobian_draw_at(step)[0] for step in range(2000)])
    assert 440 <= sum(found[0]) <= 560  # 500, give or take three standard deviations of 19
    assert 440 <= sum(found[1]) <= 560
    assert 0.15 < sum(a and b for a, b in itertools.pairwise(found[0])) / sum(found[0]) < 0.35, "and independently"
    assert found[0] != found[1]
    assert found[0] == found[2]


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", lambda k: 0.02), ("cosine", lambda k: 0.01 * (1 + math.cos(math.pi * k / 8)))],
)
def test_schedules(schedule: str, expected: Any) -> None:
    """One value a step, over the whole run: two epochs of four steps."""
    rates = Rates()
    train(small(lr=0.02, schedule=schedule), rates, max_epochs=2)
    assert rates.rates == pytest.approx([expected(k) for k in range(8)], abs=1e-9)


def test_the_optimizer_has_what_is_trained() -> None:
    module = small(lr=0.02, weight_decay=0.1, schedule="constant")
    module.model.injection.requires_grad_(False)
    before = parameters(module)
    run = train(module)
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.1
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters() if p.requires_grad}
    after = parameters(module)
    assert {name for name in before if same(before[name], after[name])} == {
        "model.injection.weight",
        "model.injection.bias",
    }


# --------------------------------------------------------------------------------------------------------- pretrained


@pytest.mark.usefixtures("weights_folder")
def test_pretrained_weights_are_the_start() -> None:
    published = publish()
    module = ImageClassifier(pretrained="tanh_deq.toy")
    assert same(dict(module.model.state_dict()), dict(published.state_dict()))
    assert module.model.training


def test_pretrained_weights_with_other_classes_are_fine_tuned(weights_folder: Path, tmp_path: Path) -> None:
    published = publish()
    with pytest.warns(zoo.ReinitializedWarning, match="trained for 10 classes, and 4 were asked for: classifier"):
        module = ImageClassifier(num_classes=4, pretrained="tanh_deq.toy", solver=Newton(), lr=0.01)
    assert same(module.model.injection.weight, published.injection.weight)
    assert module.model.deq.solver == Newton()
    images, labels = batches().dataset.tensors
    before = parameters(module)
    run = train(module, loader=DataLoader(TensorDataset(images, labels % 4), batch_size=20))
    assert not any(same(before[name], value) for name, value in parameters(module).items())
    assert module(images).shape == (80, 4)

    # The checkpoint has all weights: what it started from is not needed any more, nor warned of again.
    run.save_checkpoint(tmp_path / "mine.ckpt", weights_only=False)
    for file in weights_folder.iterdir():
        file.unlink()
    again = ImageClassifier.load_from_checkpoint(tmp_path / "mine.ckpt", weights_only=True)
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    assert (again.model.deq.solver, again.num_classes) == (Newton(), 4)
    assert module.hparams["pretrained"] == "tanh_deq.toy"


@pytest.mark.usefixtures("weights_folder")
def test_pretrained_weights_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    monkeypatch.setitem(zoo.registry._MODELS, "other", zoo.registry._MODELS["tanh_deq"])
    with pytest.raises(ValueError, match="are weights of model 'tanh_deq', but model='other' was asked for"):
        ImageClassifier("other", pretrained="tanh_deq.toy")


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "tanh_dec"}, r"unknown model 'tanh_dec'. Did you mean 'tanh_deq'\?"),
        ({"model_args": {"widht": 3}}, r"model 'tanh_deq' has no argument 'widht'. Did you mean 'width'\?"),
        ({"model_args": {"num_classes": 3}}, "num_classes is an argument of its own, beside model_args"),
        ({"solver": "Newtn"}, r"unknown solver 'Newtn'. Did you mean 'Newton'\?"),
        ({"jacobian_weight": -1.0}, r"jacobian_weight takes a number >= 0 .*; given: -1.0 and 1.0"),
        ({"jacobian_frequency": 1.5}, r"jacobian_frequency one in \[0, 1\]; given: 0.0 and 1.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing takes a number in \[0, 1\); given: -0.1"),
        ({"label_smoothing": 1.0}, r"label_smoothing takes a number in \[0, 1\); given: 1.0"),
        ({"lr": -1.0}, "lr and weight_decay take numbers >= 0; given: -1.0 and 0.0"),
        ({"weight_decay": -1.0}, "lr and weight_decay take numbers >= 0; given: 0.001 and -1.0"),
        ({"schedule": "cosin"}, "schedule takes 'cosine', 'one_cycle' or 'constant'; given: 'cosin'"),
        ({"pretrained": "nothing.at_all"}, "unknown weights 'nothing.at_all'"),
    ],
)
def test_mistakes_are_refused_where_they_are_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**arguments)


def test_a_model_of_another_task() -> None:
    batch = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    module = ImageClassifier("mdeq_segmenter", 2, {"channels": [8, 8], "stem_stride": 1, "unrolled": 1})
    with pytest.raises(zoo.InputError, match=r"logits \(B, num_classes\); this one gave shape \(2, 2, 8, 8\)"):
        module.training_step(batch, 0)


@pytest.mark.parametrize("option", ["pretrain_steps", "jacobian_weight", "jacobian_growth"])
def test_what_needs_an_equilibrium(option: str) -> None:
    with pytest.raises(ValueError, match=r"take 0 for 'resnet', which has no equilibrium layer"):
        ImageClassifier("resnet", **{option: 1})
    ImageClassifier("resnet")


def test_a_backbone_of_another_model(tmp_path: Path) -> None:
    """Copied at the start; the checkpoint has everything, and does not ask for it again."""
    source = zoo.load_pretrained("mdeq_nano.digits")
    module = ImageClassifier("mdeq_nano", num_classes=3, backbone="mdeq_nano.digits")
    ours = module.model.state_dict()
    same_shapes = [key for key in ours if not key.startswith("head.")]
    assert all(torch.equal(ours[key], source.state_dict()[key]) for key in same_shapes)
    data = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])), batch_size=4)
    run = trainer(max_steps=1)
    run.fit(module, data, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["backbone"] is None
    with pytest.raises(ValueError, match="pretrained or backbone, not both"):
        ImageClassifier("mdeq_nano", pretrained="mdeq_nano.digits", backbone="mdeq_nano.digits")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.tensor([0, 10, 3, 1]), r"from 0 to 9 \(num_classes=10\); given: from 0 to 10"),
        (torch.tensor([0, -1, 3, 1]), r"from 0 to 9 .*given: from -1 to 3"),
        (torch.tensor([0.0, 1, 3, 1]), r"int64, one an image, here of shape \(4,\); given: torch.float32"),
        (torch.tensor([[0], [1], [3], [1]]), r"here of shape \(4,\); given: torch.int64 of shape \(4, 1\)"),
        (torch.tensor([0, 1, 3]), r"here of shape \(4,\); given: torch.int64 of shape \(3,\)"),
    ],
)
def test_labels_that_are_none(label: Tensor, message: str) -> None:
    module = small()
    image = torch.rand(4, 1, 8, 8)
    with pytest.raises(zoo.InputError, match=message):
        module.training_step((image, label), 0)
    with pytest.raises(zoo.InputError, match=message):
        module.validation_step((image, label), 1)

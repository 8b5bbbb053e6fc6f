"""SemanticSegmenter: its loss and metrics by hand, what is ignored, what is refused, and the label maps it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import zoo
from lightning_modules import PredictionWriter, SemanticSegmenter
from lightning_modules.callbacks import write_png
from tests.command_line import rows, same
from tests.lightning_modules.runs import gradients, train, trainer
from zoo.implicit import DEQ, FixedPointIteration

IGNORED = 255


class HalfCell(nn.Module):
    """f(z, x) = a z + x with a = 1/2, so that z* = 2 x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.a * z + x

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Doubling(nn.Module):
    """Images whose channels are the logits, but for a factor 2."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.deq = DEQ(HalfCell(), FixedPointIteration(tol=1e-6))

    def forward(self, image: Tensor) -> Tensor:
        z, _ = self.deq(image)
        assert isinstance(z, Tensor)
        return z


@pytest.fixture(autouse=True)
def _doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.registry, "_MODELS", dict(zoo.registry._MODELS))
    zoo.registry.register_model("doubling", Doubling)


def segmenter(**arguments: Any) -> SemanticSegmenter:
    return SemanticSegmenter(**{"model": "doubling", "num_classes": 4, **arguments})


def samples(count: int = 7, size: tuple[int, int] = (5, 6), classes: int = 4, seed: int = 0) -> TensorDataset:
    """Random logits and labels, a tenth of which is ignored; the last class never occurs."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, classes, *size, generator=generator)
    image[:, -1] = -9
    label = torch.randint(0, classes - 1, (count, *size), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.1] = IGNORED
    return TensorDataset(image, label)


def by_hand(prediction: Tensor, label: Tensor, classes: int = 4) -> tuple[float, float]:
    """The mean IoU over the classes that occur, and the pixel accuracy, pixel by pixel."""
    confusion = np.zeros((classes, classes), dtype=int)
    for p, t in zip(prediction.flatten().tolist(), label.flatten().tolist(), strict=True):
        if t != IGNORED:
            confusion[t, p] += 1
    both, either = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return float((both[either > 0] / either[either > 0]).mean()), float(both.sum() / confusion.sum())


# ------------------------------------------------------------------------------------------------- loss and metrics


@pytest.mark.parametrize("stage", ["val", "test"])
def test_what_is_logged_is_counted_by_hand(stage: str) -> None:
    """Over an epoch of batches of different sizes, with pixels that are ignored and a class that does not occur."""
    data = samples()
    image, label = data.tensors
    run = getattr(trainer(), "validate" if stage == "val" else "test")
    (measured,) = run(segmenter(), DataLoader(data, batch_size=3), verbose=False)
    assert set(measured) == {
        f"{stage}/{key}"
        for key in ("loss", "miou", "pixel_accuracy", "steps", "residual", "converged", "spectral_radius")
    }
    miou, accuracy = by_hand(image.argmax(1), label)
    assert measured[f"{stage}/miou"] == pytest.approx(miou, rel=1e-6)
    assert measured[f"{stage}/pixel_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    expected = F.cross_entropy(2 * image, label, ignore_index=IGNORED).item()
    assert measured[f"{stage}/loss"] == pytest.approx(expected, rel=1e-5)
    assert measured[f"{stage}/spectral_radius"] == pytest.approx(0.5, rel=1e-5)


def test_a_training_epoch_is_counted_too() -> None:
    data = samples()
    run = train(segmenter(lr=0.0), loader=DataLoader(data, batch_size=3))
    miou, accuracy = by_hand(data.tensors[0].argmax(1), data.tensors[1])
    assert run.callback_metrics["train/miou"].item() == pytest.approx(miou, rel=1e-6)
    assert run.callback_metrics["train/pixel_accuracy"].item() == pytest.approx(accuracy, rel=1e-6)


@settings(max_examples=12, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    weights=st.none() | st.lists(st.floats(0.25, 4), min_size=4, max_size=4),
    ignore_index=st.sampled_from([255, -100, -1, 0, 3]),
    seed=st.integers(0, 2**31),
)
def test_the_loss_is_torchs(size: Any, weights: Any, ignore_index: int, seed: int) -> None:
    """With its weights and its ignored pixels, wherever there is a pixel that counts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size[0], 4, *size[1:], generator=generator).requires_grad_()
    label = torch.randint(0, 4, size, generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.3] = ignore_index
    module = segmenter(class_weights=weights, ignore_index=ignore_index)
    loss, total = module._loss(logits, label)
    counted = int((label != ignore_index).sum())
    of_pixel = [1.0] * 4 if weights is None else weights
    assert float(total) == pytest.approx(sum(of_pixel[k] for k in label[label != ignore_index].tolist()), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, logits)
    if counted == 0:
        assert loss == 0
        assert torch.equal(grad, torch.zeros_like(grad))
        return
    weight = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(logits, label, weight=weight, ignore_index=ignore_index)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 1.0]])
def test_a_batch_that_is_ignored_whole_teaches_nothing(weights: Any) -> None:
    """A factor that gradients are scaled by, as for float16, changes nothing of that."""
    image, label = samples(2).tensors
    module = segmenter(class_weights=weights)
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss = module.training_step((image, torch.full_like(label, IGNORED)), 0)
    (loss * 2.0**16).backward()
    assert loss == 0
    assert module.model.deq.cell.a.grad == 0
    # Nor does such a batch among others.
    module = segmenter(class_weights=weights)
    data = TensorDataset(torch.cat([image, image]), torch.cat([label, torch.full_like(label, IGNORED)]))
    (with_it,) = trainer().validate(module, DataLoader(data, batch_size=2), verbose=False)
    (without,) = trainer().validate(module, DataLoader(TensorDataset(image, label), batch_size=2), verbose=False)
    for key in ("val/miou", "val/pixel_accuracy"):
        assert with_it[key] == without[key]
    assert with_it["val/loss"] == pytest.approx(without["val/loss"], rel=0.05)


def test_class_weights_weigh() -> None:
    data = next(iter(DataLoader(samples(), batch_size=7)))
    found = [gradients(segmenter(class_weights=weights), data)["loss"] for weights in (None, [1.0] * 4, [9.0, 1, 1, 1])]
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - found[2]).abs() > 0.01


# -------------------------------------------------------------------------------------------------- a model of the zoo


def test_a_multiscale_model_learns_a_simple_task(tmp_path: Path) -> None:
    """Is this pixel bright, in which half of the image? A checkpoint keeps what was learnt, and all arguments."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(24, 1, 8, 8, generator=generator)
    label = (image[:, 0] > 0.5).long()
    label[:, 4:] += 2 * label[:, 4:]
    label[:, :, 0] = IGNORED
    loader = DataLoader(TensorDataset(image, label), batch_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = SemanticSegmenter(
            "mdeq_segmenter",
            num_classes=4,
            model_args={"channels": (8, 8), "in_channels": 1, "stem_stride": 1, "expansion": 1},
            solver=FixedPointIteration(tol=1e-2, max_steps=4),
            class_weights=[1.0, 1.0, 1.0, 1.0],
            pretrain_steps=4,
            pretrain_depth=2,
            jacobian_weight=0.1,
            lr=0.02,
        )
    module.model.deq.on_failure = "ignore"
    (before,) = trainer().test(module, loader, verbose=False)
    run = train(module, loader=loader, max_epochs=8)
    (after,) = run.test(module, loader, verbose=False)
    assert after["test/loss"] < 0.8 * before["test/loss"]
    assert after["test/miou"] > before["test/miou"]
    run.save_checkpoint(tmp_path / "mine.ckpt", weights_only=False)
    again = SemanticSegmenter.load_from_checkpoint(tmp_path / "mine.ckpt", weights_only=True)
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    assert not any("class_weights" in name for name in module.state_dict())
    assert torch.equal(again.class_weights, torch.ones(4))
    assert (again.num_classes, again.ignore_index, again.pretrain_depth, again.jacobian_weight) == (4, 255, 2, 0.1)
    assert dict(again.hparams) == dict(module.hparams)


# ------------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("labelled", [True, False])
def test_label_maps_are_written_as_images(tmp_path: Path, labelled: bool) -> None:
    data = samples()
    image, _ = data.tensors
    run = trainer(PredictionWriter(), default_root_dir=tmp_path)
    (first, *_) = run.predict(segmenter(), DataLoader(data if labelled else image, batch_size=3))
    assert first["label_map"].dtype == torch.uint8
    table = rows(tmp_path / "predictions.csv")
    assert [list(row.values()) for row in table] == [[str(i), f"label_map/{i:06d}.png"] for i in range(7)]
    for row, expected in zip(table, image.argmax(1), strict=True):
        with Image.open(tmp_path / row["label_map"]) as png:
            assert png.mode == "L"
            assert np.array_equal(np.asarray(png), expected.numpy())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_every_image_is_read_again_as_it_was(tmp_path_factory: Any, H: int, W: int, seed: int) -> None:
    image = torch.randint(0, 256, (H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    path = tmp_path_factory.mktemp("png") / "some.png"
    write_png(path, image)
    with Image.open(path) as png:
        png.verify()
    with Image.open(path) as png:
        assert np.array_equal(np.asarray(png), image.numpy())


def test_more_than_256_classes_have_no_grey_values(tmp_path: Path) -> None:
    image = torch.randn(2, 300, 3, 3)
    run = trainer(PredictionWriter(), default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"label maps, uint8 \(B, H, W\); given: 'label_map' of dtype torch.int64 and"):
        run.predict(segmenter(num_classes=300), DataLoader(image, batch_size=2))
    (found,) = trainer().predict(segmenter(num_classes=300), DataLoader(image, batch_size=2))
    assert torch.equal(found["label_map"], image.argmax(1))


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda label: label.fill_(4), r"labels are from 0 to 3, or ignore_index=255; given: from 4 to 4"),
        (lambda label: label.index_fill(0, torch.tensor([1]), -1), "given: from -1 to 2"),
        (lambda label: label[:, :3], r"here of shape \(2, 5, 6\); given: torch.int64 of shape \(2, 3, 6\)"),
        (lambda label: label.unsqueeze(1), r"given: torch.int64 of shape \(2, 1, 5, 6\)"),
        (lambda label: label.byte(), r"labels are int64, one a pixel.*; given: torch.uint8 of shape"),
    ],
)
def test_labels_that_do_not_fit(change: Any, message: str) -> None:
    image, label = samples(2).tensors
    with pytest.raises(zoo.InputError, match=message):
        gradients(segmenter(), (image, change(label.clone())))
    with pytest.raises(zoo.InputError, match=message):
        trainer().validate(segmenter(), DataLoader(TensorDataset(image, change(label.clone())), batch_size=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": [1.0, 2.0]}, r"class_weights takes a number >= 0 for each of 4 classes.*given: \[1.0, 2.0"),
        ({"class_weights": [1.0, 1.0, 1.0, -1.0]}, "class_weights takes a number >= 0"),
        ({"class_weights": [0.0] * 4}, "not all 0"),
        ({"model_args": {"num_classes": 4}}, "num_classes is an argument of its own"),
    ],
)
def test_mistakes_are_refused_where_they_are_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmenter(**arguments)


class Data(pl.LightningDataModule):
    """Data that say how they are."""

    def __init__(self, **attributes: int) -> None:
        super().__init__()
        vars(self).update(attributes)

    def test_dataloader(self) -> Any:
        return DataLoader(samples(), batch_size=7)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_classes": 19}, "the data have 19 classes, and the model was asked for 4: give it num_classes=19"),
        ({"num_classes": 4, "ignore_index": 0}, r"the data have ignore_index=0, and the model was asked for 255: give"),
    ],
)
def test_data_of_another_kind(attributes: dict[str, int], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer().test(segmenter(), datamodule=Data(**attributes), verbose=False)
    (measured,) = trainer().test(segmenter(), datamodule=Data(num_classes=4, ignore_index=255), verbose=False)
    assert measured["test/converged"] == 1

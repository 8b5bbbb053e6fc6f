"""The digits: the split, the batches, the augmentation, and a Trainer that learns from them."""

from __future__ import annotations

import hashlib
import itertools
import pickle

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from datamodules import DigitsDataModule, ImageDataModule, digits_split
from datamodules.digits import RandomAffine
from tests.datamodules.loading import everything, workers


def in_order(images: Tensor) -> Tensor:
    """The images as rows, sorted, to compare two passes whatever their order."""
    return torch.unique(images.flatten(1), dim=0)


def the_part(name: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one part, straight from scikit-learn."""
    digits = load_digits()
    part = getattr(digits_split(), name)
    return torch.from_numpy(digits.images[part] / 16).float().unsqueeze(1), torch.from_numpy(digits.target[part])


# ---------------------------------------------------------------------------------------------------------- the split


def test_the_split_is_the_two_lines_of_its_docstring():
    labels = load_digits().target
    rest, test = train_test_split(np.arange(1797), test_size=360, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    for given, expected in zip(digits_split(), (train, val, test), strict=True):
        np.testing.assert_array_equal(given, expected)
    for line in (
        "rest, test = train_test_split(np.arange(1797), test_size=360,",
        "stratify=labels[rest], random_state=0)",
    ):
        assert line in (digits_split.__doc__ or "")


def test_the_split_never_changes():
    """Whatever a later release of scikit-learn draws: published accuracies refer to these arrays."""
    digests = [hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:16] for part in digits_split()]
    assert digests == ["5c64829d9b3e1822", "aef7a23cd13784da", "d9101e2e97e19974"]


def test_the_parts_are_complete_disjoint_and_stratified():
    train, val, test = digits_split()
    assert (len(train), len(val), len(test)) == (1257, 180, 360)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val, test])), np.arange(1797))
    labels = load_digits().target
    share = np.bincount(labels) / 1797
    for part in (train, val, test):
        assert np.abs(np.bincount(labels[part]) - share * len(part)).max() <= 1


# -------------------------------------------------------------------------------------------------------- the loaders


@workers
@pytest.mark.parametrize("part", ["val", "test", "predict"])
def test_evaluation_loaders_give_the_part_as_it_is_in_order(part, num_workers):
    module = DigitsDataModule(batch_size=100, num_workers=num_workers)
    images, labels = everything(getattr(module, f"{part}_dataloader")())
    expected_images, expected_labels = the_part("test" if part == "predict" else part)
    assert torch.equal(images, expected_images)
    assert torch.equal(labels, expected_labels)


@workers
def test_without_augmentation_the_training_loader_gives_each_image_once_shuffled(num_workers):
    torch.manual_seed(0)
    loader = DigitsDataModule(augment=False, num_workers=num_workers).train_dataloader()
    images, labels = everything(loader)
    expected_images, expected_labels = the_part("train")
    assert torch.equal(in_order(images), in_order(expected_images))
    assert torch.equal(labels.bincount(), expected_labels.bincount())
    assert not torch.equal(labels, expected_labels)
    assert not torch.equal(labels, everything(loader)[1])
    row = (expected_images == images[0]).flatten(1).all(dim=1).nonzero().item()
    assert labels[0] == expected_labels[row]


@pytest.mark.parametrize("part", ["train", "val", "test", "predict"])
def test_batches(part):
    module = DigitsDataModule()
    loader = getattr(module, f"{part}_dataloader")()
    size = {"train": 1257, "val": 180}.get(part, 360)
    assert len(loader) == -(-size // 64)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [64] * (size // 64) + [size % 64]
    for images, labels in batches:
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.shape == (len(labels), *module.image_shape)
        assert labels.shape == (len(images),)
        assert images.min() >= 0
        assert images.max() <= 1
        assert set(labels.tolist()) <= set(range(module.num_classes))
        assert images.max() > 0.9, "the range is [0, 1], not a part of it"
    assert isinstance(loader.sampler, SequentialSampler) == (part != "train")


def test_what_it_says_of_itself():
    module = DigitsDataModule()
    assert module.image_shape == (1, 8, 8)
    assert module.num_classes == 10
    assert module.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


@pytest.mark.parametrize("gpu", [False, True])
def test_memory_is_pinned_only_where_a_gpu_is(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    module = DigitsDataModule()
    assert module.train_dataloader().pin_memory is gpu
    assert module.predict_dataloader().pin_memory is gpu


@workers
def test_workers_persist_if_there_are_any(num_workers):
    loader = DigitsDataModule(num_workers=num_workers).train_dataloader()
    assert loader.num_workers == num_workers
    assert loader.persistent_workers is (num_workers > 0)


def test_a_loader_can_be_sent_to_a_spawned_worker():
    loader = DigitsDataModule().train_dataloader()
    dataset = pickle.loads(pickle.dumps(loader.dataset))  # noqa: S301
    images, labels = dataset.collate([dataset[0], dataset[1]])
    assert images.shape == (2, 1, 8, 8)
    assert torch.equal(labels, the_part("train")[1][:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is a whole number, at least 1; given: 0"),
        ({"batch_size": 6.5}, r"batch_size is a whole number, at least 1; given: 6\.5"),
        ({"batch_size": True}, "batch_size is a whole number, at least 1; given: True"),
        ({"num_workers": -1}, "num_workers is a whole number, at least 0; given: -1"),
        ({"max_shift": -0.5}, r"max_shift is at least 0 and below inf; given: -0\.5"),
        ({"max_rotation": float("nan")}, "max_rotation is at least 0 and below inf; given: nan"),
        ({"max_scale": 1.0}, r"max_scale is at least 0 and below 1; given: 1\.0"),
        ({"max_scale": -0.1, "augment": False}, r"max_scale is at least 0 and below 1; given: -0\.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)


def test_the_arguments_are_plain_enough_for_a_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    words = ["--data=DigitsDataModule", "--data.batch_size=9", "--data.augment=false", "--data.max_shift=0.25"]
    module = parser.instantiate(parser.parse_args(words)).data
    assert isinstance(module, DigitsDataModule)
    assert (module.batch_size, module.augmentation) == (9, None)


# --------------------------------------------------------------------------------------------------- the augmentation


def reference_affine(image: np.ndarray, A: np.ndarray, t: np.ndarray) -> np.ndarray:
    """``(H, W)``: the docstring of RandomAffine, read pixel by pixel."""
    H, W = image.shape
    out = np.zeros((H, W))
    for i, j in itertools.product(range(H), range(W)):
        centre = np.array([(W - 1) / 2, (H - 1) / 2])
        x, y = A @ (np.array([j, i]) - centre) + t + centre
        for row, column in itertools.product(range(H), range(W)):
            out[i, j] += max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row)) * image[row, column]
    return out


def test_the_augmentation_is_the_affine_map_it_states():
    B, C, H, W = 4, 2, 5, 7
    torch.manual_seed(0)
    images = torch.rand(B, C, H, W)
    torch.manual_seed(1)
    output = RandomAffine(max_shift=1.5, max_rotation=60.0, max_scale=0.4)(images)
    torch.manual_seed(1)
    x, y, angle, scale = (2 * torch.rand(4, B) - 1).double().numpy()
    for b, c in itertools.product(range(B), range(C)):
        turn = np.radians(60 * angle[b])
        A = (1 + 0.4 * scale[b]) * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        expected = reference_affine(images[b, c].double().numpy(), A, 1.5 * np.array([x[b], y[b]]))
        np.testing.assert_allclose(output[b, c], expected, atol=1e-5)


def test_an_augmentation_by_nothing_is_the_identity():
    images, _ = the_part("val")
    torch.testing.assert_close(RandomAffine(0, 0, 0)(images), images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_shift", [0.25, 1.0])
def test_shifts_are_fractions_of_a_pixel_up_to_the_bound(max_shift):
    """One bright pixel's centre of mass moves by the shift, by another one for each image and axis."""
    images = torch.zeros(1000, 1, 8, 8)
    images[:, :, 3, 4] = 1
    torch.manual_seed(0)
    output = RandomAffine(max_shift, 0, 0)(images)
    at = torch.arange(8.0)
    for moved in ((output.sum((1, 3)) @ at) - 3, (output.sum((1, 2)) @ at) - 4):
        assert moved.abs().max() <= max_shift + 1e-5
        assert moved.min() < -0.95 * max_shift
        assert moved.max() > 0.95 * max_shift
        assert len(moved.unique()) > 900


@workers
def test_augmented_training_images_keep_labels_shape_and_range(num_workers):
    torch.manual_seed(0)
    loader = DigitsDataModule(num_workers=num_workers).train_dataloader()
    images, labels = everything(loader)
    originals, expected_labels = the_part("train")
    assert images.shape == originals.shape
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(labels.bincount(), expected_labels.bincount())
    distance = torch.cdist(images.flatten(1), originals.flatten(1)).min(dim=1)
    assert distance.values.min() > 0, "each image is changed"
    agreement = (expected_labels[distance.indices] == labels).float().mean()
    assert agreement > 0.95, "and nearly each still is nearest to an original of its class"


@workers
def test_the_augmentation_is_reproducible_under_a_seed_and_new_in_every_epoch(num_workers, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what seed_everything sets is taken back after the test
    monkeypatch.setenv("PL_SEED_WORKERS", "0")

    def two_epochs(seed: int) -> tuple[Tensor, Tensor]:
        seed_everything(seed, workers=True, verbose=False)
        loader = DigitsDataModule(num_workers=num_workers).train_dataloader()
        return everything(loader)[0], everything(loader)[0]

    first, second = two_epochs(1)
    again_first, again_second = two_epochs(1)
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)
    assert not torch.equal(in_order(first), in_order(second))
    assert not torch.equal(in_order(first), in_order(two_epochs(2)[0]))


# -------------------------------------------------------------------------------------------------------- the Trainer


class LinearClassifier(LightningModule):
    """As small as a classifier can be."""

    def __init__(self, entries: int, num_classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(entries, num_classes))
        self.trained_on: list[Tensor] = []
        self.validated_on: list[Tensor] = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.trained_on.append(images)
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.validated_on.append(images)
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean(), on_epoch=True)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0]).argmax(1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


# Lightning 2.6 asks torch 2.15 for its pytrees the old way; Lightning has to change that.
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
# Lightning recommends worker processes; for images in memory they only cost time.
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_a_trainer_fits_tests_and_predicts(tmp_path):
    torch.manual_seed(0)
    data = DigitsDataModule()
    model = LinearClassifier(64, data.num_classes)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 4 * 20
    assert trainer.callback_metrics["accuracy"] > 0.85
    originals, _ = the_part("train")
    assert torch.cdist(torch.cat(model.trained_on).flatten(1), originals.flatten(1)).min() > 0, "augmented"
    assert torch.equal(torch.cat(model.validated_on[:3]), the_part("val")[0]), "not augmented"

    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    predictions = torch.cat(trainer.predict(model, datamodule=data))
    accuracy = (predictions == the_part("test")[1]).float().mean().item()
    assert metrics["accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.85

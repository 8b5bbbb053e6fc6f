"""CIFAR-10 and CIFAR-100, on small files laid out and pickled like the real ones."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from sklearn.model_selection import train_test_split
from torchvision import datasets

from datamodules import CIFAR10DataModule, CIFAR100DataModule, DataError, ImageDataModule, cifar_split
from datamodules.cifar import RandomCropFlip
from tests.datamodules.loading import everything, workers

both = pytest.mark.parametrize("cls", [CIFAR10DataModule, CIFAR100DataModule])
COARSE_TO_FINE = """
beaver dolphin otter seal whale
aquarium_fish flatfish ray shark trout
orchid poppy rose sunflower tulip
bottle bowl can cup plate
apple mushroom orange pear sweet_pepper
clock keyboard lamp telephone television
bed chair couch table wardrobe
bee beetle butterfly caterpillar cockroach
bear leopard lion tiger wolf
bridge castle house road skyscraper
cloud forest mountain plain sea
camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk
crab lobster snail spider worm
baby boy girl man woman
crocodile dinosaur lizard snake turtle
hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree
bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""
SIZES = {CIFAR10DataModule: (5 * 40, 30), CIFAR100DataModule: (300, 30)}


class OldPickler(pickle.Pickler):
    """Writes a dtype's flags as 0 and 1, as the NumPy of 2009 did; today's warns when it reads them."""

    def reducer_override(self, value):
        if isinstance(value, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    OldPickler(file, protocol=2).dump(value)
    return file.getvalue()


def small_set(cls) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random images ``(N, 3072)`` and labels, every class equally often, by file name."""
    rng = np.random.default_rng(0)
    train, test = SIZES[cls]
    names = {f"data_batch_{k}": train // 5 for k in range(1, 6)} if cls is CIFAR10DataModule else {"train": train}
    names |= {"test_batch" if cls is CIFAR10DataModule else "test": test}
    classes = len(cls.class_names)
    return {
        name: (rng.integers(0, 256, (N, 3072), dtype=np.uint8), rng.permutation(np.arange(N) % classes))
        for name, N in names.items()
    }


def write(cls, root: Path, monkeypatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A small set, and its sums in the place of the real ones."""
    source, values = cls.source, small_set(cls)
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    key = "labels" if cls is CIFAR10DataModule else "fine_labels"
    for name, (images, labels) in values.items():
        (folder / name).write_bytes(pickled({"data": images, key: labels.tolist()}))
    meta = folder / source.meta["filename"]
    meta.write_bytes(pickled({source.meta["key"]: list(cls.class_names)}))

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()  # noqa: S324

    *train, test = values
    monkeypatch.setattr(source, "train_list", [[name, md5(name)] for name in train])
    monkeypatch.setattr(source, "test_list", [[test, md5(test)]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(meta.name)})
    return values


@pytest.fixture
def cifar10(tmp_path, monkeypatch) -> Path:
    """A root with a small CIFAR-10."""
    write(CIFAR10DataModule, tmp_path, monkeypatch)
    return tmp_path


def in_order(images: torch.Tensor) -> torch.Tensor:
    """The images as rows, sorted, to compare two passes whatever their order."""
    return torch.unique(images.flatten(1), dim=0)


# ---------------------------------------------------------------------------------------------------------- the split


def test_the_split_is_the_line_of_its_docstring():
    labels = np.random.default_rng(0).integers(0, 10, 50000)
    train, val = train_test_split(np.arange(50000), test_size=5000, stratify=labels, random_state=0)
    given_train, given_val = cifar_split(labels)
    np.testing.assert_array_equal(given_train, train)
    np.testing.assert_array_equal(given_val, val)
    assert "train, val = train_test_split(np.arange(50000), test_size=5000, stratify=labels, random_state=0)" in (
        cifar_split.__doc__ or ""
    )
    assert (len(train), len(val)) == (45000, 5000)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(50000))
    assert np.abs(np.bincount(labels[val]) - np.bincount(labels) / 10).max() <= 1


def test_without_validation_all_images_train():
    train, val = cifar_split(np.arange(20) % 10, val_size=0)
    np.testing.assert_array_equal(train, np.arange(20))
    assert len(val) == 0


# -------------------------------------------------------------------------------------------------------- the loaders


@both
def test_the_values_read_are_the_values_written(cls, tmp_path, monkeypatch):
    *training, test = write(cls, tmp_path, monkeypatch).values()
    images, labels = (np.concatenate(column) for column in zip(*training, strict=True))
    module = cls(root=str(tmp_path), val_size=100, augment=False)
    module.prepare_data()
    train, val = cifar_split(labels, 100)
    for split, (expected_images, expected_labels) in (
        (module.splits.train, (images[train], labels[train])),
        (module.splits.val, (images[val], labels[val])),
        (module.splits.test, test),
    ):
        given_images, given_labels = (torch.stack(column) for column in zip(*split, strict=True))
        assert given_images.dtype == torch.float32
        expected = expected_images.reshape(-1, 3, 32, 32).astype(np.float32) / 255
        np.testing.assert_array_equal(given_images, expected)
        np.testing.assert_array_equal(given_labels, expected_labels)
        assert split.images.dtype == torch.uint8, "a quarter of the memory of float32"


@workers
@pytest.mark.parametrize(("part", "sizes"), [("train", [64, 64, 52]), ("val", [20]), ("test", [30]), ("predict", [30])])
def test_batches(part, sizes, num_workers, cifar10):
    module = CIFAR10DataModule(root=str(cifar10), val_size=20, num_workers=num_workers)
    batches = list(getattr(module, f"{part}_dataloader")())
    assert [tuple(images.shape) for images, _ in batches] == [(size, 3, 32, 32) for size in sizes]
    split = getattr(module.splits, {"predict": "test"}.get(part, part))
    images, labels = everything(batches)
    assert torch.equal(labels.bincount(), split.labels.bincount())
    unchanged = part != "train"
    assert torch.equal(labels, split.labels) == unchanged, "only the training images are shuffled"
    assert torch.equal(in_order(images), in_order(split.images / 255)) == unchanged, "and augmented"


def test_all_images_train_and_the_test_images_validate_if_that_is_asked_for(cifar10):
    alone = CIFAR10DataModule(root=str(cifar10), val_size=0)
    assert len(alone.splits.train) == 200
    assert list(alone.val_dataloader()) == []
    asked = CIFAR10DataModule(root=str(cifar10), val_size=0, validate_on_test=True)
    assert torch.equal(everything(asked.val_dataloader())[0], everything(asked.test_dataloader())[0])


def test_what_they_say_of_themselves():
    assert CIFAR10DataModule().image_shape == CIFAR100DataModule().image_shape == (3, 32, 32)
    assert (CIFAR10DataModule().num_classes, CIFAR100DataModule().num_classes) == (10, 100)
    assert CIFAR10DataModule().class_names[6] == "frog"
    assert list(CIFAR100DataModule().class_names) == sorted(COARSE_TO_FINE.split()), "five in each of 20 groups"


def test_the_arguments_are_plain_enough_for_a_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    words = ["--data=CIFAR100DataModule", "--data.root=/somewhere", "--data.val_size=0", "--data.augment=false"]
    module = parser.instantiate(parser.parse_args(words)).data
    assert isinstance(module, CIFAR100DataModule)
    assert module.folder == Path("/somewhere/cifar-100-python")
    assert (module.val_size, module.augmentation) == (0, None)


# --------------------------------------------------------------------------------------------------- the augmentation


def test_the_augmentation_crops_from_a_black_border_and_mirrors():
    """Each output is one of the 162 windows of its image, and all of them occur, about equally often."""
    torch.manual_seed(0)
    images = torch.rand(4000, 2, 6, 5)
    output = RandomCropFlip(padding=4)(images)
    assert output.shape == images.shape
    padded = torch.zeros(4000, 2, 14, 13)
    padded[:, :, 4:10, 4:9] = images
    counts = []
    found = torch.zeros(4000, dtype=torch.int64)
    for top in range(9):
        for left in range(9):
            window = padded[:, :, top : top + 6, left : left + 5]
            for candidate in (window, window.flip(-1)):
                same = (output == candidate).flatten(1).all(1)
                counts.append(int(same.sum()))
                found += same
    assert bool((found >= 1).all())
    assert min(counts) > 5
    assert max(counts) < 60


# ------------------------------------------------------------------------------------------- what is missing or broken


@both
def test_a_missing_set_is_one_clear_error(cls, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        cls(root=str(tmp_path)).prepare_data()
    text = str(caught.value)
    assert text.startswith(f"{cls.source.__name__} was not found: there is no ")
    assert str(tmp_path / cls.source.base_folder) in text
    assert f"{cls.__name__}(download=True)" in text
    assert f"By hand: unpack this file into {tmp_path}:\n  {cls.source.url}" in text
    assert list(tmp_path.iterdir()) == []


def test_only_the_file_that_is_missing_is_asked_for(cifar10):
    (cifar10 / "cifar-10-batches-py" / "data_batch_4").unlink()
    module = CIFAR10DataModule(root=str(cifar10))
    for step in (module.prepare_data, module.train_dataloader):
        with pytest.raises(FileNotFoundError, match="there is no data_batch_4 in"):
            step()


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_changed_file_is_named_and_never_unpickled(name, cifar10):
    path = cifar10 / "cifar-10-batches-py" / name
    path.write_bytes(pickle.dumps(Path("/")))
    with pytest.raises(DataError, match="its md5 is not") as caught:
        CIFAR10DataModule(root=str(cifar10)).setup("fit")
    assert str(caught.value).startswith(f"{path} is corrupt: ")


def test_download(tmp_path, monkeypatch, request):
    """torchvision fetches an archive, checks its sum and unpacks it; this one comes from this machine."""
    write(CIFAR10DataModule, tmp_path / "made", monkeypatch)
    archive = tmp_path / "mirror" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(archive.parent)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    request.addfinalizer(lambda: (server.shutdown(), thread.join(), server.server_close()))
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    module = CIFAR10DataModule(root=str(tmp_path / "data"), download=True, val_size=20)
    with pytest.raises(DataError, match=r"^CIFAR10 could not be downloaded: ") as caught:
        module.prepare_data()
    assert f"By hand: unpack this file into {tmp_path / 'data'}:\n  http://127.0.0.1:" in str(caught.value)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())  # noqa: S324
    module.prepare_data()
    assert len(module.splits.test) == 30
    archive.unlink()
    module.prepare_data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_size": -1}, "val_size is a whole number, at least 0; given: -1"),
        ({"validate_on_test": True}, "validate_on_test leaves no use for the val_size=5000 images held out"),
        ({"batch_size": 0}, "batch_size is a whole number, at least 1; given: 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(**arguments)


@pytest.mark.parametrize("val_size", [9, 191, 5000])
def test_a_validation_set_that_cannot_be_split_off(val_size, cifar10):
    message = f"val_size={val_size} does not split 200 training images of 10 classes: choose 0, or from 10 to 190"
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(root=str(cifar10), val_size=val_size).setup("fit")

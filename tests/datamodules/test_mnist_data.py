"""MNIST and Fashion-MNIST, on small files laid out like the real ones."""

from __future__ import annotations

import gzip
import hashlib
import struct
from collections.abc import Iterator
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

from datamodules import DataError, FashionMNISTDataModule, ImageDataModule, MNISTDataModule, mnist_split
from datamodules.idx import read_idx
from tests.datamodules.loading import workers

both = pytest.mark.parametrize("cls", [MNISTDataModule, FashionMNISTDataModule])
TRAIN, TEST = 240, 60
NAMES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def idx(values: np.ndarray) -> bytes:
    """An IDX file, written from the format's description."""
    return b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def small_set() -> dict[str, np.ndarray]:
    """Random images, the ten labels equally often in random order, by file name."""
    rng = np.random.default_rng(0)
    values = {}
    for part, size in (("train", TRAIN), ("t10k", TEST)):
        values[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        values[f"{part}-labels-idx1-ubyte"] = rng.permutation(np.arange(size, dtype=np.uint8) % 10)
    return values


def write(folder: Path, zipped: bool = False) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    values = small_set()
    for name, array in values.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return values


@pytest.fixture
def mnist(tmp_path) -> Path:
    """A root with a small MNIST."""
    write(tmp_path / "MNIST" / "raw")
    return tmp_path


# ---------------------------------------------------------------------------------------------------------- the split


def test_the_split_is_the_line_of_its_docstring():
    labels = np.random.default_rng(0).integers(0, 10, 60000)
    train, val = train_test_split(np.arange(60000), test_size=5000, stratify=labels, random_state=0)
    given_train, given_val = mnist_split(labels)
    np.testing.assert_array_equal(given_train, train)
    np.testing.assert_array_equal(given_val, val)
    assert "train, val = train_test_split(np.arange(60000), test_size=5000, stratify=labels, random_state=0)" in (
        mnist_split.__doc__ or ""
    )


@pytest.mark.parametrize("size", [60000, 1210])
def test_the_parts_are_complete_disjoint_and_stratified(size):
    labels = np.random.default_rng(1).integers(0, 10, size)
    train, val = mnist_split(labels)
    assert len(val) == size // 12
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(size))
    assert np.abs(np.bincount(labels[val]) - np.bincount(labels) / 12).max() <= 1


# -------------------------------------------------------------------------------------------------------- the loaders


@pytest.mark.parametrize("zipped", [False, True], ids=["raw", "gzip"])
@both
def test_the_values_read_are_the_values_written(cls, zipped, tmp_path):
    name = cls.__name__.removesuffix("DataModule")
    values = write(tmp_path / name / "raw", zipped)
    module = cls(root=str(tmp_path), num_workers=0)
    module.prepare_data()
    module.setup("fit")
    train, val = mnist_split(values[NAMES[1]])
    for split, part, rows in (
        (module.splits.train, "train", train),
        (module.splits.val, "train", val),
        (module.splits.test, "t10k", np.arange(TEST)),
    ):
        images, labels = (torch.stack(column) for column in zip(*split, strict=True))
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        expected = values[f"{part}-images-idx3-ubyte"][rows].astype(np.float32)[:, None] / 255
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, values[f"{part}-labels-idx1-ubyte"][rows])


def test_torchvision_reads_the_same_files_alike(mnist):
    """The layout of these tests is the real one: torchvision's own reader agrees with ours."""
    theirs = datasets.MNIST(str(mnist), train=False)
    ours = MNISTDataModule(root=str(mnist)).splits.test
    assert torch.equal(ours.images.squeeze(1), theirs.data)
    assert torch.equal(ours.labels, theirs.targets)


@workers
@pytest.mark.parametrize(
    ("part", "sizes"), [("train", [64] * 3 + [28]), ("val", [20]), ("test", [60]), ("predict", [60])]
)
def test_batches(part, sizes, num_workers, mnist):
    module = MNISTDataModule(root=str(mnist), num_workers=num_workers)
    loader = getattr(module, f"{part}_dataloader")()
    assert len(loader) == len(sizes)
    batches = list(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(size, *module.image_shape) for size in sizes]
    assert [tuple(labels.shape) for _, labels in batches] == [(size,) for size in sizes]
    split = getattr(module.splits, {"predict": "test"}.get(part, part))
    labels = torch.cat([labels for _, labels in batches])
    assert torch.equal(labels.bincount(), split.labels.bincount())
    assert torch.equal(labels, split.labels) == (part != "train"), "only the training images are shuffled"


def test_what_they_say_of_themselves():
    for cls in (MNISTDataModule, FashionMNISTDataModule):
        assert cls().image_shape == (1, 28, 28)
        assert cls().num_classes == 10
    assert MNISTDataModule().class_names[7] == "7"
    assert FashionMNISTDataModule().class_names[9] == "Ankle boot"


def test_the_arguments_are_plain_enough_for_a_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    words = ["--data=FashionMNISTDataModule", "--data.root=/somewhere", "--data.download=true", "--data.num_workers=0"]
    module = parser.instantiate(parser.parse_args(words)).data
    assert isinstance(module, FashionMNISTDataModule)
    assert module.folder == Path("/somewhere/FashionMNIST/raw")
    assert module.download is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": -3}, "batch_size is a whole number, at least 1; given: -3"),
        ({"num_workers": "2"}, "num_workers is a whole number, at least 0; given: '2'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MNISTDataModule(**arguments)


# ------------------------------------------------------------------------------------------- what is missing or broken


@both
def test_a_missing_set_is_one_clear_error(cls, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        cls(root=str(tmp_path)).prepare_data()
    name = cls.__name__.removesuffix("DataModule")
    text = str(caught.value)
    assert text.startswith(f"{name} was not found")
    assert str(tmp_path / name / "raw") in text
    assert "--data.download true" in text
    assert f"{cls.__name__}(download=True)" in text
    for mirror in getattr(datasets, name).mirrors:
        for file in NAMES:
            assert f"{mirror}{file}.gz" in text
    assert list(tmp_path.iterdir()) == [], "looking for files leaves nothing behind"


def test_a_relative_root_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        MNISTDataModule().prepare_data()
    assert str(tmp_path / "data" / "MNIST" / "raw") in str(caught.value)


def test_only_the_file_that_is_missing_is_asked_for(mnist):
    (mnist / "MNIST" / "raw" / NAMES[2]).unlink()
    module = MNISTDataModule(root=str(mnist))
    for step in (module.prepare_data, module.train_dataloader):
        with pytest.raises(FileNotFoundError, match=r"there is no t10k-images-idx3-ubyte\.gz in") as caught:
            step()
        assert "train-images" not in str(caught.value)


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder that this machine serves; torchvision takes it for the real mirror."""
    folder = tmp_path / "mirror"
    write(folder, zipped=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    sums = [hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest() for name in NAMES]  # noqa: S324
    resources = [(f"{name}.gz", md5) for name, md5 in zip(NAMES, sums, strict=True)]
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_download(mirror, tmp_path):
    module = MNISTDataModule(root=str(tmp_path / "data"), download=True)
    module.prepare_data()
    np.testing.assert_array_equal(module.splits.test.images.squeeze(1), small_set()[NAMES[2]])


def test_what_is_there_is_not_fetched_again(mirror, mnist):
    for file in mirror.iterdir():
        file.unlink()
    MNISTDataModule(root=str(mnist), download=True).prepare_data()


def test_a_failed_download_says_how_to_do_without(tmp_path, monkeypatch):
    nobody = "http://127.0.0.1:1/"
    monkeypatch.setattr(datasets.MNIST, "mirrors", [nobody])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DataError, match=r"^MNIST could not be downloaded: Error downloading train-images") as caught:
        MNISTDataModule(root=str(tmp_path), download=True).prepare_data()
    text = str(caught.value)
    assert "refused" in text
    assert str(tmp_path / "MNIST" / "raw") in text
    for name in NAMES:
        assert f"  {nobody}{name}.gz" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (NAMES[0], b"", "it does not begin like an IDX file of bytes in 3 dimensions"),
        (NAMES[0], b"<!DOCTYPE html><html>404 Not Found</html>", "it does not begin like an IDX file of bytes"),
        (NAMES[0], idx(np.zeros(240, np.uint8)), "it does not begin like an IDX file of bytes in 3 dimensions"),
        (NAMES[1], idx(np.zeros((240, 28, 28), np.uint8)), "it does not begin like an IDX file of bytes in 1 dim"),
        (NAMES[0], idx(np.zeros((9, 32, 32), np.uint8)), r"of shape \(32, 32\); expected: \(28, 28\)"),
        (NAMES[2], idx(np.zeros((60, 28, 28), np.uint8))[:-1], "it announces 60 items .* but holds 47039 bytes"),
        (NAMES[2], idx(np.zeros((60, 28, 28), np.uint8)) + b"\0", "it announces 60 items .* but holds 47041 bytes"),
        (NAMES[3], idx(np.zeros(59, np.uint8)), "it holds 59 labels for 60 images"),
        (NAMES[1], idx(np.full(240, 10, np.uint8)), "it holds the label 10; expected: 0 to 9"),
    ],
)
def test_a_corrupt_file_is_named_before_training_starts(name, content, message, mnist):
    path = mnist / "MNIST" / "raw" / name
    path.write_bytes(content)
    module = MNISTDataModule(root=str(mnist))
    module.prepare_data()
    with pytest.raises(ValueError, match=message) as caught:
        module.setup("fit")
    assert str(caught.value).startswith(f"{path} is corrupt: ")
    assert str(caught.value).endswith("Delete it and fetch it again")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_cut_short_anywhere_is_corrupt(suffix, tmp_path):
    values = np.arange(7, dtype=np.uint8)
    whole = gzip.compress(idx(values)) if suffix else idx(values)
    path = tmp_path / f"labels{suffix}"
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_idx(path, ()), values)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is corrupt"):
            read_idx(path, ())


def test_a_damaged_gzip_file_never_gives_other_values(tmp_path):
    """Each bit flipped: the file is refused, or the bit was of no account (a time stamp, say)."""
    values = np.arange(7, dtype=np.uint8)
    whole = gzip.compress(idx(values))
    path = tmp_path / "labels.gz"
    refusals = []
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read_idx(path, ()), values)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 4 * len(whole)
    assert all(refusal.startswith(f"{path} is corrupt") for refusal in refusals)

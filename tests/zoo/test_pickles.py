"""Pickles: what torch.save writes is read; what would run, lies about its sizes or is damaged is refused everywhere."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.command_line import ROOT, same
from zoo.originals.mdeq import original_name
from zoo.pickles import is_pickle, read_pickle


def save_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def save_old(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_plain(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_new_protocol(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=5))


FORMATS = [save_zip, save_old, save_plain, save_new_protocol]


@pytest.mark.parametrize("save", [save_zip, save_old])
def test_tensors_and_plain_data_are_read(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    base = torch.rand(4, 3)
    content = {
        "state_dict": collections.OrderedDict(
            a=base, row=base[1], t=base.T, n=torch.arange(3), half=torch.rand(2).half()
        ),
        "parameter": torch.nn.Parameter(torch.rand(2)),
        "plain": [1, 2.5, "three", None, True, (4, {"five": b"six"})],
        "empty": torch.empty(0, 3),
    }
    save(content, tmp_path / "a.pth")
    read = read_pickle(tmp_path / "a.pth")
    assert same(dict(read.pop("state_dict")), dict(content.pop("state_dict")))
    assert torch.equal(read.pop("parameter"), content.pop("parameter"))
    assert same(read, content)


# ------------------------------------------------------------------------------------------------------- what would run


class Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Program:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return builtins.exec, (f"open({str(self.marker)!r}, 'w').close()",)


def hub(path: str) -> Any:
    return torch.hub.load(str(ROOT), "tanh_deq", weights=path, source="local")


DOORS: dict[str, Callable[[str], Any]] = {
    "load_pretrained": zoo.load_pretrained,
    "load_pretrained file:": lambda path: zoo.load_pretrained(f"file:{path}"),
    "load_pretrained with sizes": lambda path: zoo.load_pretrained(path, num_classes=3),
    "load_original": zoo.load_original,
    "load_backbone": lambda path: zoo.load_backbone(zoo.create_model("mdeq_nano_scenes"), path),
    "torch.hub": hub,
}


@pytest.mark.parametrize("save", FORMATS)
@pytest.mark.parametrize("malice", [Command, Program])
def test_nothing_is_executed(save: Callable[[Any, Path], None], malice: type, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    wanted = "posix.system" if malice is Command else "builtins.exec"
    nested = {"state_dict": {"update_block.encoder.a": torch.zeros(2)}, "more": [{"deep": (malice(marker),)}]}
    for content in (malice(marker), nested):
        for suffix in (".safetensors", ".ckpt", ".pth", ".pkl", ""):
            path = tmp_path / f"mine{suffix}"
            save(content, path)
            for door, load in DOORS.items():
                with pytest.raises(zoo.WeightsError) as error:
                    load(str(path))
                message = str(error.value)
                assert message.startswith(f"{path} holds more than tensors and plain data"), (door, message)
                assert f"nothing was loaded. It asks for {wanted}" in message, (door, message)
                assert "\n" not in message
            assert not marker.exists(), suffix
    torch.load(path, weights_only=False) if save in (save_zip, save_old) else pickle.loads(path.read_bytes())  # noqa: S301
    assert marker.exists()


def test_the_folder_of_a_run_or_of_the_hub(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for inside in ("model.safetensors", "checkpoints/best.ckpt"):
        path = tmp_path / inside.replace("/", "_") / inside
        path.parent.mkdir(parents=True)
        save_zip(Command(marker), path)
        with pytest.raises(zoo.WeightsError, match=r"It asks for posix\.system"):
            zoo.load_pretrained(tmp_path / inside.replace("/", "_"))
    assert not marker.exists()


def test_many_names_are_one_line(tmp_path: Path) -> None:
    names = "".join(f"cos\nname{i}{'x' * 200}\n0" for i in range(50))
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + names.encode() + b"N.")
    with pytest.raises(zoo.WeightsError) as error:
        read_pickle(tmp_path / "a.pkl")
    assert "and 44 more. Where you trust" in str(error.value)
    assert len(str(error.value)) < 1500


# --------------------------------------------------------------------------------------------------- what lies of sizes


def archive_of(pickled: bytes, parts: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **parts}.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def tensor_of(count: int, key: str = "0", storage: str = "FloatStorage") -> bytes:
    """A pickled tensor of shape (4,) that says its storage has so many numbers."""
    rebuild = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    words = b"".join(b"X" + struct.pack("<I", len(word)) + word.encode() for word in (key, "cpu"))
    number = b"\x8a\x09" + count.to_bytes(9, "little", signed=True)
    persistent = b"(X\x07\x00\x00\x00storagectorch\n" + storage.encode() + b"\n" + words + number + b"tQ"
    return rebuild + persistent + b"K\x00K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR."


def test_a_pickle_made_by_hand_is_read(tmp_path: Path) -> None:
    """So that the next test refuses what it says it does."""
    data = torch.tensor([1.0, 2, 3, 4])
    (tmp_path / "a.pth").write_bytes(archive_of(tensor_of(4), {"data/0": data.numpy().tobytes()}))
    assert same(read_pickle(tmp_path / "a.pth"), data)


@pytest.mark.parametrize("count", [5, 2**20, 2**33, 2**60, -1])
@pytest.mark.parametrize("part", ["data/0", "data/1"])
def test_a_tensor_that_is_declared_larger_than_it_is(count: int, part: str, tmp_path: Path) -> None:
    """torch.load would read past the end of the part, into whatever is in memory there."""
    path = tmp_path / "a.pth"
    path.write_bytes(archive_of(tensor_of(count), {part: bytes(16)}))
    with pytest.raises(
        zoo.WeightsError, match=rf"^{path} is damaged: it declares -?[\d,]+ bytes of tensors where it has"
    ):
        read_pickle(path)


ALLOCATE = """
import resource, struct, sys
from pathlib import Path

import zoo
from tests.zoo.test_pickles import old_of
from zoo.pickles import read_pickle

here = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (here + 2**28,) * 2)
for count in (2**28, 2**33, 2**60):
    Path(sys.argv[1]).write_bytes(old_of(count))
    try:
        read_pickle(sys.argv[1])
    except zoo.WeightsError as error:
        assert "is damaged: it declares " in str(error), error
    else:
        raise AssertionError("was read")
"""


def old_of(count: int, content: bytes | None = None) -> bytes:
    """A file in torch's old format with one tensor, which is declared so long; or with what is given."""
    magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)
    version, machine = pickle.dumps(torch.serialization.PROTOCOL_VERSION, 2), pickle.dumps({"little_endian": True}, 2)
    tensor = content or tensor_of(count).replace(b"tQ", b"NtQ")  # it has views of storages too
    return magic + version + machine + tensor + pickle.dumps(["0"], 2) + struct.pack("<q", count % 2**62) + bytes(16)


def test_nothing_is_allocated_for_what_is_not_there(tmp_path: Path) -> None:
    """In a process that may take 256 MiB more than it has."""
    (tmp_path / "four.pth").write_bytes(old_of(4))
    assert same(read_pickle(tmp_path / "four.pth"), torch.zeros(4))
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE, str(tmp_path / "a.pth")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["builtins.bytearray", "torch.Tensor", "torch.FloatTensor", "torch.storage.UntypedStorage"]
)
@pytest.mark.parametrize("in_zip", [True, False])
def test_what_takes_a_size_is_not_called(name: str, in_zip: bool, tmp_path: Path) -> None:
    """torch.load calls these, with 2^40 here."""
    module, _, word = name.rpartition(".")
    call = f"c{module}\n{word}\n".encode() + b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R."
    path = tmp_path / "a.pth"
    path.write_bytes(archive_of(b"\x80\x02" + call, {}) if in_zip else old_of(4, b"\x80\x02" + call))
    with pytest.raises(zoo.WeightsError, match=f"^{path} holds more than tensors .* It asks for {name}. "):
        read_pickle(path)


@pytest.mark.parametrize("tensor", [torch.zeros(2, device="meta"), torch.zeros(2).to_sparse()], ids=["meta", "sparse"])
def test_tensors_without_numbers_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"a": tensor}, tmp_path / "a.pth")
    with pytest.raises(zoo.WeightsError, match=r"holds more than tensors .* It asks for torch\._utils\._rebuild_"):
        read_pickle(tmp_path / "a.pth")


def test_one_number_is_no_matrix(tmp_path: Path) -> None:
    """A step of 0 makes a tensor of any size of it, and a model of that size."""
    path = tmp_path / "a.ckpt"
    with torch.device("meta"):
        model = zoo.create_model("tanh_deq", width=2**20)
    state = {f"model.{key}": torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}
    torch.save({"deq_zoo_model": {"model": "tanh_deq", "arguments": {"width": 2**20}}, "state_dict": state}, path)
    with pytest.raises(
        zoo.WeightsError, match=rf"^{path} is damaged: its 'model\.[\w.]+' has shape .* of 4 bytes; noth"
    ):
        zoo.load_pretrained(path)
    shapes = {original_name(key, segmenter=False): x for key, x in zoo.create_model("mdeq_tiny").state_dict().items()}
    torch.save({key: torch.zeros(()).expand(x.shape) for key, x in shapes.items()}, tmp_path / "a.pth")
    with pytest.raises(zoo.WeightsError, match=r"is damaged: its '.*' has shape .* of 4 bytes"):
        zoo.load_original(tmp_path / "a.pth", stem_stride=1)


def test_a_bomb(tmp_path: Path) -> None:
    """Compressed to a thousandth."""
    path = tmp_path / "a.pth"
    path.write_bytes(archive_of(tensor_of(4), {"data/0": bytes(2**24)}, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 2**17
    with pytest.raises(zoo.WeightsError, match=r"is damaged: its part archive/data\.pkl does not match its checksum"):
        read_pickle(path)


@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL"])
def test_two_parts_of_one_name(name: str, tmp_path: Path) -> None:
    """Python's zipfile reads the last, torch another, whose names have no case."""
    file = io.BytesIO(archive_of(tensor_of(4), {"data/0": bytes(16)}))
    with warnings.catch_warnings(), zipfile.ZipFile(file, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(f"archive/{name}", tensor_of(4))
    (tmp_path / "a.pth").write_bytes(file.getvalue())
    with pytest.raises(zoo.WeightsError, match=r"(?i)is damaged: its part archive/data\.pkl does not match"):
        read_pickle(tmp_path / "a.pth")


@pytest.mark.parametrize("save", [save_zip, save_old])
def test_files_that_are_cut_off(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save({"a": torch.rand(50), "b": torch.rand(50)}, path)
    data = path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(zoo.WeightsError, match=f"^{path} is damaged"):
            read_pickle(path)


def test_a_script_is_no_checkpoint(tmp_path: Path) -> None:
    """TorchScript archives are zip files too."""
    path = tmp_path / "a.pt"
    path.write_bytes(archive_of(tensor_of(4), {"data/0": bytes(16), "constants.pkl": b"\x80\x02).", "code/a.py": b"x"}))
    with pytest.raises(zoo.WeightsError, match=f"^{path} is damaged, or not a file that torch.save wrote: "):
        read_pickle(path)


@pytest.mark.parametrize(
    ("name", "start", "expected"),
    [
        ("a.safetensors", b"\x80\x00\x00\x00\x00\x00\x00\x00{", False),
        ("a.pth", b"\x28\x00\x00\x00\x00\x00\x00\x00{", False),
        ("a.safetensors", b"PK\x03\x04more", True),
        ("a.safetensors", b"\x80\x02}q\x00", True),
        ("a.safetensors", b"cposix\nsy", True),
        ("a.safetensors", b"", False),
        ("a.ckpt", b"", True),
        ("a", b"any text", True),
    ],
)
def test_the_content_says_how_to_read_it(name: str, start: bytes, expected: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(start)
    assert is_pickle(tmp_path / name) is expected

"""Weights in W&B artifacts: logged by a real run, and back; what W&B serves is a stand-in, its manifests are real."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

import zoo
from tests.command_line import DIGITS, ROOT, TINY, fit
from zoo.sources import fetch

NAME = "me/deq-zoo/model-abc"


class Served:
    """What ``wandb.Api().artifact`` gives: a real artifact's manifest and check, and files that come from here."""

    def __init__(self, artifact: wandb.Artifact) -> None:
        artifact.is_draft = lambda: False
        self.artifact, self.manifest, self.digest = artifact, artifact.manifest, artifact.digest
        self.files = {
            str(entry.path): Path(entry.local_path).read_bytes()
            for entry in artifact.manifest.entries.values()
            if entry.local_path
        }

    def download(self, root: str, skip_cache: bool) -> str:
        assert skip_cache
        for name, data in self.files.items():
            Path(root, name).parent.mkdir(parents=True, exist_ok=True)
            Path(root, name).write_bytes(data)
        return root

    def verify(self, root: str) -> None:
        self.artifact.verify(root)


class Api:
    """The part of ``wandb.Api`` that loading needs."""

    served: dict[str, Served | Exception]
    asked: list[str]

    def artifact(self, name: str) -> Served:
        self.asked.append(name)
        found = self.served.get(name, wandb.errors.CommError(f"artifact {name!r} not found"))
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture(autouse=True)
def nobody(wandb_offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a key and without a cache."""
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody's .netrc
    monkeypatch.setenv("DEQ_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DEQ_ZOO_OFFLINE", raising=False)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    Api.served, Api.asked = {}, []
    monkeypatch.setattr(wandb, "Api", Api)
    return Api


def artifact(folder: Path, **files: bytes) -> Served:
    made = wandb.Artifact("model-abc", type="model")
    for name, data in files.items():
        path = folder / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        made.add_file(str(path), name=name.replace("__", "."))
    return Served(made)


def weights(folder: Path, width: int = 4) -> bytes:
    zoo.save_weights(zoo.create_model("tanh_deq", width=width), folder / "w.safetensors")
    return (folder / "w.safetensors").read_bytes()


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def refused(source: str, **arguments: object) -> str:
    with pytest.raises(zoo.WeightsError) as error:
        fetch(source, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_a_run_logs_comes_back(api: type[Api], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's logger with ``log_model``, offline; its artifacts as W&B would serve them."""
    logged: list[tuple[Served, list[str]]] = []
    log_artifact = wandb.Run.log_artifact

    def listen(run: wandb.Run, artifact: Any, *, aliases: list[str], **kwargs: Any) -> Any:
        done = log_artifact(run, artifact, aliases=aliases, **kwargs)
        logged.append((Served(artifact), aliases))
        return done

    monkeypatch.setattr(wandb.Run, "log_artifact", listen)
    monkeypatch.setenv("WANDB_MODE", "offline")
    preset = str(ROOT / "configs" / "loggers" / "wandb.yaml")
    run = fit("-c", DIGITS, "-c", preset, "--trainer.logger.init_args.log_model", "true", *TINY)
    wandb.finish()

    api.served = {f"{NAME}:{alias}": served for served, aliases in logged for alias in aliases}
    assert api.served.keys() == {f"{NAME}:best", f"{NAME}:latest"}
    loaded = zoo.load_pretrained(f"wandb:{NAME}:best", solver="Newton")
    assert same_weights(loaded, zoo.load_pretrained(run.best))
    assert type(loaded.deq.solver).__name__ == "Newton"
    assert same_weights(zoo.load_pretrained(f"wandb:{NAME}:best", offline=True), loaded)


def test_aliases_move_and_versions_do_not(api: type[Api], tmp_path: Path) -> None:
    first, second = weights(tmp_path), weights(tmp_path, width=5)
    api.served = {f"{NAME}:{alias}": artifact(tmp_path, model__safetensors=first) for alias in ("latest", "v0")}
    assert fetch(f"wandb:{NAME}:latest").read_bytes() == fetch(f"wandb:{NAME}:v0").read_bytes() == first
    assert fetch(f"wandb:{NAME}:latest").read_bytes() == first
    assert api.asked == [f"{NAME}:{alias}" for alias in ("latest", "v0", "latest")]
    api.served[f"{NAME}:latest"] = artifact(tmp_path, model__safetensors=second, notes__txt=b"")
    assert fetch(f"wandb:{NAME}:latest", offline=True).read_bytes() == first
    assert fetch(f"wandb:{NAME}:v0").read_bytes() == first
    assert len(api.asked) == 3, "neither needs to ask"
    assert fetch(f"wandb:{NAME}:latest").read_bytes() == second
    assert list((tmp_path / "cache" / "wandb").iterdir()) == [], "nothing is left over"


def test_other_bytes_than_the_manifest_says(api: type[Api], tmp_path: Path) -> None:
    served = artifact(tmp_path, model__safetensors=weights(tmp_path))
    data = bytearray(served.files["model.safetensors"])
    data[-1] ^= 1
    served.files["model.safetensors"] = bytes(data)
    api.served[f"{NAME}:v0"] = served
    message = refused(f"wandb:{NAME}:v0")
    assert message.startswith(f"wandb:{NAME}:v0 did not come as its manifest says (Digest mismatch")
    assert message.endswith("nothing was loaded")
    assert not (tmp_path / "cache" / "blobs").exists()


@pytest.mark.parametrize("alias", ["v0", "latest"])
def test_a_version_that_changed_since_its_first_use(api: type[Api], tmp_path: Path, alias: str) -> None:
    """A project made again, or a file exchanged; of an alias, W&B says that it is the same version."""
    source = f"wandb:{NAME}:{alias}"
    api.served[f"{NAME}:{alias}"] = artifact(tmp_path, model__safetensors=weights(tmp_path))
    path = fetch(source)
    path.unlink()
    other = artifact(tmp_path, model__safetensors=weights(tmp_path, width=8))
    if alias == "latest":
        other.digest = api.served[f"{NAME}:{alias}"].digest
    api.served[f"{NAME}:{alias}"] = other
    message = refused(source)
    assert message.startswith(f"{source} has other content: its sha256 is ")
    assert f"at its first use ({tmp_path / 'cache' / 'sources'}" in message
    assert f"it was {path.stem}; nothing was loaded; if the change is meant, delete that file, or pin" in message
    assert not path.exists()


def test_a_full_disk_and_a_large_artifact(api: type[Api], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    served = artifact(tmp_path, model__safetensors=weights(tmp_path))
    monkeypatch.setattr(served, "download", lambda **_: pytest.fail("it was fetched"))
    api.served[f"{NAME}:v0"] = served
    assert "has 1,000 free; make room, or choose another cache with cache_dir= or" in refused(f"wandb:{NAME}:v0")


def test_a_damaged_file_of_the_cache(api: type[Api], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = weights(tmp_path)
    api.served[f"{NAME}:v0"] = artifact(tmp_path, model__safetensors=data)
    path = fetch(f"wandb:{NAME}:v0")
    path.write_bytes(data[:-1])
    assert refused(f"wandb:{NAME}:v0", offline=True).startswith(f"wandb:{NAME}:v0 is not in the cache (")
    assert fetch(f"wandb:{NAME}:v0").read_bytes() == data
    assert [record.levelno for record in caplog.records if "is damaged or was replaced" in record.message] == (
        [logging.WARNING] * 2
    )


def test_a_pin_of_the_user(api: type[Api], tmp_path: Path) -> None:
    data = weights(tmp_path)
    api.served[f"{NAME}:v0"] = artifact(tmp_path, model__safetensors=data)
    assert "it was pinned to aaaa" in refused(f"wandb:{NAME}:v0", sha256="a" * 64)
    path = fetch(f"wandb:{NAME}:v0")
    assert fetch(f"wandb:{NAME}:v0#sha256={path.stem}") == path


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a__txt": b"x"}, "does not have one .safetensors or .ckpt file of its own; its files: a.txt"),
        ({"a__ckpt": b"x", "b__safetensors": b"x"}, "its files: a.ckpt, b.safetensors. Fetch it with `wandb artifact"),
        ({"a__ckpt": b"<html>"}, "gave no weights file (safetensors, or one of torch.save): it begins with '<html>'"),
    ],
)
def test_other_artifacts(api: type[Api], tmp_path: Path, files: dict[str, bytes], told: str) -> None:
    api.served[f"{NAME}:v0"] = artifact(tmp_path, **files)
    assert told in refused(f"wandb:{NAME}:v0")


@pytest.mark.parametrize("name", ["a.ckpt", "beside.txt"])
def test_a_file_that_is_kept_elsewhere(api: type[Api], tmp_path: Path, name: str) -> None:
    """A reference, which W&B does not check, and follows."""
    (tmp_path / "a.ckpt").write_bytes(b"x")
    made = wandb.Artifact("model-abc", type="model")
    made.add_reference(f"file://{tmp_path}/a.ckpt", name=name)
    if name != "a.ckpt":
        made.add_file(str(tmp_path / "a.ckpt"), name="a.ckpt")
    api.served[f"{NAME}:v0"] = Served(made)
    assert "does not have one .safetensors or .ckpt file of its own" in refused(f"wandb:{NAME}:v0")


def test_no_such_artifact(api: type[Api]) -> None:
    message = refused(f"wandb:{NAME}:v9")
    assert message.startswith(f"wandb:{NAME}:v9 cannot be fetched: artifact '{NAME}:v9' not found. See whether entity")


def test_no_login() -> None:
    """The real client, which finds no key."""
    message = refused(f"wandb:{NAME}:v0")
    assert message.startswith(f"wandb:{NAME}:v0 cannot be fetched without a login: run `wandb login`, or set WANDB_API")


def test_offline_asks_nobody(api: type[Api], tmp_path: Path) -> None:
    note = tmp_path / "cache" / "sources"
    assert refused(f"wandb:{NAME}:v0", offline=True).startswith(
        f"wandb:{NAME}:v0 is not in the cache (it would be noted in {note}"
    )
    assert api.asked == []


@pytest.mark.parametrize("name", ["", "a:b", "a/b:c", "a/b/c", "a/b/c:", "a/b/c:d/e", "a/../c d:e"])
def test_mistaken_names(name: str) -> None:
    with pytest.raises(ValueError, match="is no artifact; one is written wandb:entity/project/artifact:alias"):
        fetch(f"wandb:{name}")

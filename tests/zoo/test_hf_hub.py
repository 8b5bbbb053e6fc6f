"""The real client of the Hugging Face hub against a stand-in on loopback: load, resume, tamper, offline, push."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

import zoo
from tests.servers import Hub, Reply, serving
from tests.toy_weights import publish
from zoo.sources import fetch

REPO = "org/tanh"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(Hub()) as hub:
        assert isinstance(hub, Hub)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("DEQ_ZOO_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.delenv("DEQ_ZOO_OFFLINE", raising=False)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # between its tries
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def model() -> torch.nn.Module:
    return zoo.create_model("tanh_deq", width=20)


@pytest.fixture
def data(model: torch.nn.Module, tmp_path: Path) -> bytes:
    zoo.save_weights(model, tmp_path / "x.safetensors")
    return (tmp_path / "x.safetensors").read_bytes()


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def gets(hub: Hub) -> list[str]:
    return [asked.path for asked in hub.asked if asked.method == "GET" and not asked.path.startswith("/api/")]


def refused(source: str, **arguments: object) -> str:
    with pytest.raises(zoo.WeightsError) as error:
        fetch(source, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------- load


def test_weights_are_loaded_from_a_repository(hub: Hub, model: torch.nn.Module, data: bytes, tmp_path: Path) -> None:
    commit = hub.commit(REPO, {"model.safetensors": data})
    loaded = zoo.from_pretrained(REPO, solver="Newton")
    assert same_weights(loaded, model)
    assert type(loaded.deq.solver).__name__ == "Newton"
    sha256 = hashlib.sha256(data).hexdigest().upper()
    assert same_weights(zoo.from_pretrained(REPO, commit, sha256=sha256, cache_dir=tmp_path / "cache"), model)
    with pytest.raises(zoo.WeightsError, match="it was pinned to aaaa"):
        zoo.from_pretrained(REPO, sha256="a" * 64)
    assert same_weights(zoo.load_pretrained(f"hf:{REPO}@{commit}"), model)
    assert len(gets(hub)) == 1
    sent = {(asked.path[:5], asked.headers.get("authorization")) for asked in hub.asked}
    assert sent - {("/api/", None)} == {("/org/", "Bearer hf_test"), ("/cdn/", None)}, "the token goes to the hub only"
    assert (tmp_path / "cache" / "hf" / "models--org--tanh").is_dir()


def test_revisions_and_files(hub: Hub, data: bytes) -> None:
    first = hub.commit(REPO, {"model.safetensors": data})
    hub.commit(REPO, {"model.safetensors": data + b"x", "deep/small.ckpt": b"small"}, "main")
    hub.commit(REPO, {"model.safetensors": data + b"y"}, "refs/pr/3")
    assert fetch(f"hf:{REPO}").read_bytes() == data + b"x"
    assert fetch(f"hf:{REPO}@{first}").read_bytes() == data
    assert fetch(f"hf:{REPO}@refs/pr/3").read_bytes() == data + b"y"
    assert fetch(f"hf:{REPO}@main/deep/small.ckpt").read_bytes() == b"small"
    assert fetch(f"hf:{REPO}/deep/small.ckpt").read_bytes() == b"small"
    hub.commit(REPO, {"model.safetensors": data + b"z"})
    assert fetch(f"hf:{REPO}").read_bytes() == data + b"z", "a branch moves on"


def test_a_cut_connection_is_resumed(hub: Hub, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what it keeps are whole pieces
    hub.commit(REPO, {"model.safetensors": data})
    hub.cdn[hashlib.sha256(data).hexdigest()] = Reply(data, etag='"of the cdn"', cuts=[1000, 2000])
    assert fetch(f"hf:{REPO}").read_bytes() == data
    assert [asked.headers.get("range") for asked in hub.asked if "/cdn/" in asked.path] == [
        *(None, "bytes=1000-", "bytes=3000-")
    ]


# ----------------------------------------------------------------------------------------------------- tamper, offline


@pytest.mark.parametrize("small", [False, True], ids=["large file", "in git"])
def test_a_damaged_file_is_fetched_again(hub: Hub, data: bytes, small: bool, caplog: pytest.LogCaptureFixture) -> None:
    source = f"hf:{REPO}/x.ckpt" if small else f"hf:{REPO}"
    hub.commit(REPO, {"model.safetensors": data, "x.ckpt": data})
    path = fetch(source)
    bad = bytearray(data)
    bad[-1] ^= 1
    path.resolve().write_bytes(bad)
    message = refused(source, offline=True)
    assert message.startswith(f"{path} is damaged or was replaced: its sha256 is {hashlib.sha256(bad).hexdigest()}")
    assert message.endswith("nothing was loaded. Load it once where there is a network")
    assert len(gets(hub)) == 1
    assert fetch(source).read_bytes() == data
    assert "it is fetched again" in caplog.text
    assert len(gets(hub)) == 2
    assert fetch(source, offline=True).read_bytes() == data


@pytest.mark.parametrize("small", [False, True], ids=["large file", "in git"])
def test_a_file_damaged_before_its_first_use(hub: Hub, data: bytes, small: bool, tmp_path: Path) -> None:
    """Nothing is pinned yet: the hub's own name of the content tells."""
    source = f"hf:{REPO}/x.ckpt" if small else f"hf:{REPO}"
    hub.commit(REPO, {"model.safetensors": data, "x.ckpt": data})
    path = fetch(source)
    shutil.rmtree(tmp_path / "cache" / "sources")
    path.resolve().write_bytes(data[:-1])
    assert "is damaged or was replaced" in refused(source, offline=True)


def test_other_bytes_than_the_hub_names(hub: Hub, data: bytes) -> None:
    hub.commit(REPO, {"model.safetensors": data})
    bad = data[:-1] + bytes([data[-1] ^ 1])
    hub.cdn[hashlib.sha256(data).hexdigest()] = Reply(bad)
    message = refused(f"hf:{REPO}")
    assert message.endswith(f" came damaged: its sha256 is {hashlib.sha256(bad).hexdigest()}; nothing was loaded")
    hub.cdn.clear()
    assert fetch(f"hf:{REPO}").read_bytes() == data


def test_where_links_cannot_be_made_the_first_use_pins(hub: Hub, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """As on Windows: the snapshot's file is no link, and its name tells nothing of its content."""
    hub.commit(REPO, {"model.safetensors": data})
    path = fetch(f"hf:{REPO}")
    path.unlink()
    path.write_bytes(data)
    assert fetch(f"hf:{REPO}", offline=True) == path
    path.write_bytes(data + b"x")
    assert "is damaged or was replaced" in refused(f"hf:{REPO}", offline=True)


def test_offline_takes_what_is_there(
    hub: Hub, model: torch.nn.Module, data: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.commit(REPO, {"model.safetensors": data})
    zoo.from_pretrained(REPO)
    asked = len(hub.asked)
    monkeypatch.setenv("DEQ_ZOO_OFFLINE", "1")
    assert same_weights(zoo.from_pretrained(REPO), model)
    message = refused("hf:org/other")
    assert message.startswith(f"hf:org/other cannot be fetched: it is not in the cache ({tmp_path / 'cache' / 'hf'})")
    assert len(hub.asked) == asked


def test_a_pin_of_the_user(hub: Hub, data: bytes) -> None:
    hub.commit(REPO, {"model.safetensors": data})
    sha256 = hashlib.sha256(data).hexdigest()
    assert fetch(f"hf:{REPO}#sha256={sha256}").read_bytes() == data
    assert f"its sha256 is {sha256}, it was pinned to {'a' * 64}; nothing" in refused(f"hf:{REPO}", sha256="a" * 64)


# ---------------------------------------------------------------------------------------------------------- what fails


class Evil:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("door", ["hf", "http"])
def test_code_in_a_pickle_is_not_run(hub: Hub, tmp_path: Path, door: str) -> None:
    torch.save({"state_dict": {}, "x": Evil(tmp_path / "run")}, tmp_path / "evil.ckpt")
    data = (tmp_path / "evil.ckpt").read_bytes()
    hub.commit(REPO, {"evil.ckpt": data})
    source = f"hf:{REPO}/evil.ckpt" if door == "hf" else f"{hub.url}/{REPO}/resolve/main/evil.ckpt"
    with pytest.raises(zoo.WeightsError, match=r"posix\.mkdir"):
        zoo.load_pretrained(source)
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "run").exists(), "it would have run"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "hf:org/none",
            "hf:org/none cannot be fetched: there is no repository org/none, or it is private: log in with",
        ),
        ("hf:org/tanh@v9", "hf:org/tanh@v9 cannot be fetched: org/tanh has no revision v9"),
        ("hf:org/tanh@a/b", "org/tanh has no revision a; a / in a revision is written %2F"),
        ("hf:org/tanh@a%2Fb", "hf:org/tanh@a%2Fb cannot be fetched: org/tanh has no revision a/b"),
        ("hf:org/tanh/no.ckpt", "cannot be fetched: org/tanh has no file no.ckpt at revision main; write hf:org/tanh@"),
        ("hf:org/gated", "cannot be fetched: org/gated is gated: accept its terms on the hub, and log in with"),
    ],
)
def test_what_is_not_there(hub: Hub, source: str, told: str) -> None:
    hub.commit(REPO, {"README.md": b""})
    hub.gated.add("org/gated")
    assert told in refused(source)


def test_no_hub_there(monkeypatch: pytest.MonkeyPatch, hub: Hub, data: bytes) -> None:
    hub.commit(REPO, {"model.safetensors": data})
    fetch(f"hf:{REPO}")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(f"hf:{REPO}").read_bytes() == data, "its client takes what is there"
    assert "the hub cannot be reached (" in refused("hf:org/other")


@pytest.mark.parametrize(
    "name", ["tanh", "org/tanh/", "org/tanh@", "org/tanh/../x", "a/b@c@d", "org/tanh@main/../x", ""]
)
def test_mistaken_names(name: str) -> None:
    with pytest.raises(ValueError, match="is no file of the Hugging Face hub; one is written hf:org/name"):
        fetch(f"hf:{name}")


def test_neither_folder_nor_repository(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder \./nowhere, and a repository of the Hugging Face hub is"):
        zoo.from_pretrained("./nowhere")
    with pytest.raises(ValueError, match="is a folder, which has no revision 'v1'"):
        zoo.from_pretrained(tmp_path, revision="v1")


# ------------------------------------------------------------------------------------------------------- save and push


def front_matter(card: str) -> dict[str, object]:
    _, front, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(front))


def test_a_saved_folder_is_loaded(model: torch.nn.Module, tmp_path: Path) -> None:
    folder = zoo.save_pretrained(model, tmp_path / "mine")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]
    assert same_weights(zoo.from_pretrained(folder), model)
    card = (folder / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "deq-zoo",
        "tags": ["deep-equilibrium-model", "pytorch", "tanh_deq"],
    }
    assert "`zoo.create_model('tanh_deq', width=20)`" in card
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    huggingface_hub.ModelCard(card).data.to_dict()


@pytest.mark.usefixtures("weights_folder")
@pytest.mark.parametrize("licence", ["MIT", "of our own"])
def test_a_card_of_a_record(tmp_path: Path, licence: str) -> None:
    model = publish()
    (record,) = zoo.list_weights()
    card = zoo.save_pretrained(model, tmp_path / "x", dataclasses.replace(record, licence=licence)) / "README.md"
    front = front_matter(card.read_text())
    assert (front["license"], front.get("license_name")) == (("mit", None) if licence == "MIT" else ("other", licence))
    assert "# tanh_deq.toy\n" in card.read_text()
    assert 'zoo.load_pretrained("x")' in card.read_text(), "these weights, and not those that ship"


@pytest.mark.usefixtures("weights_folder")
@pytest.mark.parametrize("other", ["another model", "another size"])
def test_a_record_of_other_weights(hub: Hub, tmp_path: Path, other: str) -> None:
    publish()
    (record,) = zoo.list_weights()
    model = zoo.create_model("resnet") if other == "another model" else zoo.create_model("tanh_deq", width=20)
    with pytest.raises(
        ValueError, match=r"the record tanh_deq\.toy is of tanh_deq with 496 parameters, and this model"
    ):
        zoo.save_pretrained(model, tmp_path / "x", record)
    with pytest.raises(ValueError, match=r"the record tanh_deq\.toy is of tanh_deq"):
        zoo.push_to_hub(model, REPO, record=record)
    assert not (tmp_path / "x").exists()
    assert hub.asked == []


@pytest.mark.parametrize("there", ["README.md", "model.safetensors"])
def test_nothing_is_overwritten(model: torch.nn.Module, tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("precious")
    with pytest.raises(FileExistsError, match=f"has {there} already; choose another folder, or replace with overwrite"):
        zoo.save_pretrained(model, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
    zoo.save_pretrained(model, tmp_path, overwrite=True)
    assert same_weights(zoo.from_pretrained(tmp_path), model)


def test_a_file_in_place_of_a_folder(model: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with pytest.raises(NotADirectoryError, match=r"/x is a file; save_pretrained takes a folder"):
        zoo.save_pretrained(model, tmp_path / "x", overwrite=True)
    assert (tmp_path / "x").read_text() == "precious"


def test_a_model_made_by_hand_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was not made by zoo\.create_model"):
        zoo.save_pretrained(zoo.TanhDEQ(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("branch", [None, "trial", "feature/y"])
def test_a_model_is_pushed_and_comes_back(hub: Hub, model: torch.nn.Module, branch: str | None) -> None:
    source = zoo.push_to_hub(model, REPO, branch=branch, private=True, commit_message="First")
    commit = hub.refs[REPO][branch or "main"]
    assert source == f"hf:{REPO}@{commit}"
    assert {"README.md", "model.safetensors"} <= hub.repos[REPO][commit].keys()
    assert same_weights(zoo.load_pretrained(source), model)
    assert same_weights(zoo.from_pretrained(REPO, revision=branch), model)
    assert ("model.safetensors" in hub.repos[REPO][hub.refs[REPO]["main"]]) == (branch is None)
    written = f"hf:{REPO}" if branch is None else f"hf:{REPO}@{branch.replace('/', '%2F')}"
    assert f'zoo.load_pretrained("{written}")' in hub.repos[REPO][commit]["README.md"].decode()
    assert same_weights(zoo.load_pretrained(written), model)
    made = next(asked for asked in hub.asked if asked.path == "/api/repos/create")
    assert b"private" in made.body
    zoo.push_to_hub(model, REPO, branch=branch)


def test_a_push_without_a_login(hub: Hub, model: torch.nn.Module) -> None:
    with pytest.raises(zoo.WeightsError, match=r"org/tanh was not uploaded: .*401.* Log in with `hf auth login`"):
        zoo.push_to_hub(model, REPO, token="mistaken")  # noqa: S106
    assert hub.repos == {}

"""Downloads from a real server on loopback that cuts, lies, stalls and changes: the right bytes, or one clear error."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from tests.command_line import ROOT
from tests.servers import Reply, Server, serving
from zoo import downloads
from zoo.blobs import SPARE, shown
from zoo.sources import fetch, is_remote

DATA = (2).to_bytes(8, "little") + b"{}" + random.Random(0).randbytes(600_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(downloads, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(downloads, "TIMEOUT", 5.0)
    monkeypatch.setenv("DEQ_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DEQ_ZOO_OFFLINE", raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    server.replies["/a.safetensors"] = Reply(DATA)
    return f"{server.url}/a.safetensors"


def ranges(server: Server) -> list[str | None]:
    return [asked.headers.get("range") for asked in server.asked]


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.parent.name in {"blobs", "parts"})


def refused(url: str, **arguments: object) -> str:
    with pytest.raises(zoo.WeightsError) as error:
        fetch(url, **arguments)
    message = str(error.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# ------------------------------------------------------------------------------------------------------- what goes well


def test_a_file_is_kept_by_its_content(server: Server, url: str, tmp_path: Path) -> None:
    path = fetch(url)
    assert path == tmp_path / "cache" / "blobs" / f"{SHA256}.safetensors"
    assert path.read_bytes() == DATA
    assert fetch(url) == path == fetch(url, offline=True) == fetch(f"{url}#sha256={SHA256.upper()}")
    assert len(server.asked) == 1
    server.replies["/b.safetensors"] = Reply(DATA)
    assert fetch(f"{server.url}/b.safetensors?token=secret") == path
    notes = [path.read_text() for path in (tmp_path / "cache" / "sources").iterdir()]
    assert sorted(json.loads(note)["source"] for note in notes) == [url, f"{server.url}/b.safetensors"]
    assert left_over(tmp_path / "cache") == [f"{SHA256}.safetensors"]


def test_files_of_one_name_are_two_files(server: Server) -> None:
    others = {name: DATA + name.encode() for name in ("/large/weights.pth", "/nano/weights.pth")}
    server.replies.update({name: Reply(data) for name, data in others.items()})
    for name, data in others.items():
        assert fetch(server.url + name).read_bytes() == data


def test_the_cache_is_chosen(url: str, tmp_path: Path) -> None:
    assert fetch(url, cache_dir=tmp_path / "mine").is_relative_to(tmp_path / "mine")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("scheme", ["https:", "HTTP:", "hf:", "wandb:"])
def test_what_is_remote(scheme: str) -> None:
    assert is_remote(f"{scheme}//x")
    assert not is_remote(f"x{scheme}")
    assert not is_remote("tanh_deq.digits")


def test_weights_are_loaded_from_a_server(server: Server, weights_folder: Path) -> None:
    model = zoo.create_model("tanh_deq", width=6)
    zoo.save_weights(model, weights_folder / "x.safetensors")
    server.replies["/x.safetensors"] = Reply((weights_folder / "x.safetensors").read_bytes())
    loaded = zoo.load_pretrained(f"{server.url}/x.safetensors")
    assert zoo.spec_of(loaded) == zoo.spec_of(model)
    assert all(value.equal(loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_redirect_is_followed(server: Server, url: str) -> None:
    server.replies["/moved"] = Reply(status=302, headers={"Location": "/a.safetensors"})
    assert fetch(f"{server.url}/moved").read_bytes() == DATA


def test_progress_is_shown_on_a_terminal_only(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(url)
    assert capsys.readouterr() == ("", "")
    shutil.rmtree(os.environ["DEQ_ZOO_CACHE"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    fetch(url)
    assert "a.safetensors" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- cut and resumed


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 300_000), max_size=2))
def test_cut_connections_are_resumed(cuts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving() as server:
        server.replies["/a"] = Reply(DATA, cuts=list(cuts))
        assert fetch(f"{server.url}/a", cache_dir=tmp_path_factory.mktemp("cache")).read_bytes() == DATA
        starts = [sum(cuts[:n]) for n in range(len(cuts) + 1)]
        assert ranges(server) == [f"bytes={start}-" if start else None for start in starts]


def test_a_file_is_continued_by_the_next_call(server: Server, url: str, tmp_path: Path) -> None:
    server.replies["/a.safetensors"].cuts = [100_000, 50_000, 1]
    message = refused(url)
    assert message == (
        f"{url} cannot be fetched: 150,001 of {len(DATA):,} bytes came; tried 3 times. "
        "What came, 150,001 bytes, is kept: run it again to go on"
    )
    assert len(left_over(tmp_path / "cache")) == 2
    assert fetch(url).read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]
    assert [asked.headers.get("if-range") for asked in server.asked] == [None, '"v1"', '"v1"', '"v1"']
    assert left_over(tmp_path / "cache") == [f"{SHA256}.safetensors"]


def test_a_killed_download_goes_on_from_its_last_note(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bytes after the note may be anything: the process ended before it knew."""
    server.replies["/a.safetensors"].cuts = [100_000] * 3
    refused(url)
    (part,) = (path for path in (tmp_path / "cache" / "parts").iterdir() if path.suffix != ".json")
    with part.open("ab") as file:
        file.write(b"half a piece")
    assert fetch(url).read_bytes() == DATA
    assert ranges(server)[-1] == "bytes=300000-"


@pytest.mark.parametrize("how", ["part", "cut", "note", "other note"])
def test_a_part_that_was_tampered_with_is_not_used(
    server: Server, url: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.replies["/a.safetensors"].cuts = [100_000] * 3
    refused(url)
    note, part = sorted((tmp_path / "cache" / "parts").iterdir(), key=lambda path: path.suffix != ".json")
    data = bytearray(part.read_bytes())
    data[5_000] ^= 1
    match how:
        case "part":
            part.write_bytes(data)
        case "cut":
            part.write_bytes(part.read_bytes()[:70_000])
        case "note":
            note.write_text("{")
        case _:
            note.write_text(json.dumps({**json.loads(note.read_text()), "size": "many"}))
    assert fetch(url).read_bytes() == DATA
    assert ranges(server)[-1] is None
    assert f"{part} is not as it was left; its download starts afresh" in caplog.text


@pytest.mark.parametrize("without", ["ranges", "etag", "strong etag"])
def test_a_server_that_cannot_resume_is_asked_afresh(server: Server, url: str, without: str, tmp_path: Path) -> None:
    reply = server.replies["/a.safetensors"]
    reply.cuts = [100_000]
    reply.ranges, reply.etag = without != "ranges", {"etag": None, "strong etag": 'W/"v1"'}.get(without, '"v1"')
    assert fetch(url).read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-" if without == "ranges" else None]


def test_the_time_of_the_last_change_is_a_version_too(server: Server, url: str) -> None:
    reply = server.replies["/a.safetensors"]
    reply.etag, reply.cuts = "Mon, 01 Jan 2024 00:00:00 GMT", [100_000]
    reply.headers = {"ETag": None, "Last-Modified": reply.etag}
    assert fetch(url).read_bytes() == DATA
    assert server.asked[1].headers["if-range"] == reply.etag


def test_a_file_that_changed_between_two_tries_is_not_patched(server: Server, url: str) -> None:
    server.replies["/a.safetensors"].cuts = [100_000] * 3
    refused(url)
    new = DATA[:10] + DATA[:9:-1]
    server.replies["/a.safetensors"] = Reply(new, etag='"v2"')
    assert fetch(url).read_bytes() == new


@pytest.mark.parametrize("range_", ["bytes 5-9/10", "bytes */10", "nonsense"])
def test_another_part_than_was_asked_for(server: Server, url: str, range_: str) -> None:
    reply = server.replies["/a.safetensors"]
    reply.cuts = [100_000] * 3
    refused(url)
    reply.headers = {"Content-Range": range_}
    assert fetch(url).read_bytes() == DATA
    assert ranges(server)[-2:] == ["bytes=300000-", None]


def test_a_file_that_became_shorter(server: Server, url: str) -> None:
    server.replies["/a.safetensors"].cuts = [100_000] * 3
    refused(url)
    server.replies["/a.safetensors"] = Reply(DATA[:1000])  # which lies, and has the same ETag
    assert fetch(url).read_bytes() == DATA[:1000]
    assert ranges(server)[-2:] == ["bytes=300000-", None]


FETCH = """
import sys, types

sys.modules["zoo"] = types.ModuleType("zoo")  # without its __init__.py, which would take the time of importing torch
sys.modules["zoo"].__path__ = ["zoo"]
from zoo.sources import fetch

print("ready", flush=True)
input()
print(fetch(sys.argv[1]))
"""


def test_two_processes_fetch_a_file_once(server: Server, url: str) -> None:
    server.replies["/a.safetensors"].waits = 1.5
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", FETCH, url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:  # at once, now that both are there
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] == f"{fetch(url, offline=True)}\n"
    assert len(server.asked) == 1
    assert sorted("another process is fetching" in err for _, err in said) == [False, True]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (Reply(status=404), "cannot be fetched: the server answers 404 Not Found; there is no such file"),
        (Reply(status=403), "cannot be fetched: the server answers 403 Forbidden; it wants a login, or the link has"),
        (Reply(status=401), "cannot be fetched: the server answers 401 Unauthorized; it wants a login"),
        (Reply(status=418), "cannot be fetched: the server answers 418 I'm a Teapot"),
        (Reply(status=500), "cannot be fetched: the server answers 500 Internal Server Error; tried 3 times."),
        (
            Reply(b"\n<!DOCTYPE html>\n<html>Please log in</html>", headers={"Content-Type": "text/html"}),
            "gave no weights file (safetensors, or one of torch.save): it begins with '<!DOCTYPE html> <html>Please",
        ),
        (Reply(b'{"error": "no"}'), "gave no weights file (safetensors, or one of torch.save): it begins with '{"),
        (Reply(b""), "gave no weights file (safetensors, or one of torch.save): it is empty"),
        (Reply(DATA, headers={"Content-Length": "700000"}), f"{len(DATA):,} of 700,000 bytes came; tried 3 times."),
        (Reply(DATA, headers={"Content-Length": None}), "comes without its length, so that an end cannot be told"),
        (Reply(DATA, headers={"Content-Encoding": "gzip"}), "is compressed on its way"),
        (Reply(DATA, headers={"Content-Length": str(1 << 60)}), "1,152,921,504,606,846,976 bytes, and "),
        (
            Reply(status=302, headers={"Location": "file:///etc/hostname"}),
            "Redirection to url 'file:///etc/hostname' is not",
        ),
        (Reply(status=302, headers={"Location": "ftp://127.0.0.1/a"}), "to ftp://127.0.0.1/a, which is not followed"),
        (Reply(status=302, headers={"Location": "http://example.org/a"}), "to http://example.org/a, which is not"),
        (Reply(status=302, headers={"Location": "https://me:pw@host/a"}), "an address with a password in it is not"),
        (Reply(status=302, headers={"Location": "/a.safetensors"}), "cannot be fetched: the server answers 302"),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else "",
)
def test_bad_answers(server: Server, url: str, tmp_path: Path, reply: Reply, told: str) -> None:
    server.replies["/a.safetensors"] = reply
    message = refused(url)
    assert message.startswith(url)
    assert told in message
    assert not [name for name in left_over(tmp_path / "cache") if name.startswith(SHA256)]
    server.replies["/a.safetensors"] = Reply(DATA, etag='"good"')
    assert fetch(url).read_bytes() == DATA


def test_no_answer(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    server.replies["/a.safetensors"].pauses = True
    message = refused(url)
    assert "nothing came for 0.2 s; tried 3 times. What came, " in message
    server.replies["/a.safetensors"] = Reply(DATA, waits=30)
    assert "no answer within 0.2 s; tried 3 times. What came, " in refused(url)


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        message = refused(f"http://127.0.0.1:{taken.getsockname()[1]}/a.safetensors")
    assert "no connection (" in message
    assert message.endswith("; tried 3 times.")


def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_address(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert refused("https://weights.invalid/a.safetensors") == (
        "https://weights.invalid/a.safetensors cannot be fetched: no address of weights.invalid is known; "
        "is there a network? ([Errno -2] Name or service not known)"
    )


def test_an_unknown_host_to_which_another_redirects(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def known(host: str, *given: object, **named: object) -> object:
        if host != "127.0.0.1":
            raise socket.gaierror(-2, "Name or service not known")
        return resolve(host, *given, **named)

    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", known)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server.replies["/moved"] = Reply(status=302, headers={"Location": "https://weights.invalid/a"})
    assert "no address of weights.invalid is known" in refused(f"{server.url}/moved")


def test_a_server_without_tls(server: Server) -> None:
    message = refused(server.url.replace("http:", "https:") + "/a.safetensors")
    assert "cannot be fetched: no secure connection to 127.0.0.1:" in message


def test_a_full_disk(url: str, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    message = refused(url)
    assert f"has {len(DATA):,} bytes, and " in message
    assert "has 1,000 free; make room, or choose another cache with cache_dir= or DEQ_ZOO_CACHE" in message


@pytest.mark.parametrize("etag", [None, '"v1"'])
def test_a_file_without_end_does_not_fill_the_disk(
    url: str, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, etag: str | None
) -> None:
    usage = namedtuple("usage", "total used free")
    parts = tmp_path / "cache" / "parts"

    def shrinking(_: object) -> object:
        return usage(0, 0, SPARE + 400_000 - sum(path.stat().st_size for path in parts.iterdir()))

    monkeypatch.setattr(shutil, "disk_usage", shrinking)
    server.replies["/a.safetensors"] = Reply(DATA, etag=etag, headers={"Content-Length": None})
    message = refused(url, sha256=SHA256)
    assert re.search(r"has more than [\d,]+ bytes, and .* free; make room, or choose another cache with", message)
    assert left_over(tmp_path / "cache") == []


def test_a_disk_that_is_full_all_the_same(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others write too. What has no version cannot be gone on with, and makes room."""
    server.replies["/a.safetensors"].etag = None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "_require_room", full)
        message = refused(url)
    assert message.endswith("No space left on device; choose another with cache_dir= or DEQ_ZOO_CACHE")
    assert left_over(Path(os.environ["DEQ_ZOO_CACHE"])) == []
    assert fetch(url).read_bytes() == DATA


def test_a_cache_that_cannot_be_written(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"cannot be kept in the cache {tmp_path / 'file'}: " in refused(url, cache_dir=tmp_path / "file")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("http://example.org/a.safetensors", "over http: anybody on the way can change the file; use https:"),
        ("https:///a", "is no address; https://HOST/PATH is"),
        ("https://host/a b", "is no address"),
        ("https://host:x/a", "is no address"),
        ("https://me:secret@host/a", "an address with a password in it is not fetched"),
        ("https://host/a#sha256=12", "a sha256 has 64 hexadecimal digits; given: '12'"),
        ("https://host/a#md5=12", "after # stands sha256="),
        ("ftp://host/a", "'ftp://host/a' is nothing to be fetched; what is begins with https:"),
    ],
)
def test_mistaken_addresses(source: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        fetch(source)
    assert "secret" not in str(error.value)


def test_a_pin_given_twice() -> None:
    with pytest.raises(ValueError, match=r"^https://host/a is pinned twice: to aaaa"):
        fetch(f"https://host/a?token=secret#sha256={'a' * 64}", sha256="b" * 64)


def test_a_pin_that_is_no_text() -> None:
    with pytest.raises(ValueError, match="a sha256 has 64 hexadecimal digits; given: 5"):
        fetch("https://host/a", sha256=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://host/a.ckpt?token=secret", "https://host/a.ckpt"),
        ("HTTP://me:secret@host/a", "HTTP://...@host/a"),
        ("https://host/a#sha256=12", "https://host/a#sha256=12"),
        ("runs/a?b/x@y.ckpt", "runs/a?b/x@y.ckpt"),
        ("hf:org/name@main", "hf:org/name@main"),
    ],
)
def test_what_is_shown_of_a_source(source: str, expected: str) -> None:
    assert shown(source) == expected


# ------------------------------------------------------------------------------------------------------ pins and damage


def test_other_content_than_the_pinned(server: Server, url: str, tmp_path: Path) -> None:
    other = hashlib.sha256(b"").hexdigest()
    assert refused(url, sha256=other) == (
        f"{url} has other content: its sha256 is {SHA256}, it was pinned to {other}; nothing was loaded"
    )
    assert left_over(tmp_path / "cache") == []
    assert fetch(url, sha256=SHA256).read_bytes() == DATA
    assert refused(url, sha256=other, offline=True).startswith(f"{url} is not in the cache (it would be ")


def test_a_pinned_file_needs_no_length(server: Server, url: str) -> None:
    server.replies["/a.safetensors"].headers = {"Content-Length": None}
    assert fetch(url, sha256=SHA256).read_bytes() == DATA


@pytest.mark.parametrize("how", ["flip", "cut", "grow", "empty"])
def test_a_damaged_file_of_the_cache_is_fetched_again(
    server: Server, url: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch(url)
    flipped = bytearray(DATA)
    flipped[-1] ^= 1
    path.write_bytes({"flip": bytes(flipped), "cut": DATA[:-1], "grow": DATA + b"x", "empty": b""}[how])
    message = refused(url, offline=True)
    assert message.startswith(f"{url} is not in the cache (it would be {path}), and nothing is fetched offline")
    assert f"{path} is damaged or was replaced: its sha256 is " in caplog.text
    assert len(server.asked) == 1
    assert fetch(url).read_bytes() == DATA
    assert len(server.asked) == 2


def test_a_source_that_changed_since_its_first_use(server: Server, url: str) -> None:
    fetch(url).unlink()
    server.replies["/a.safetensors"] = Reply(DATA + b"x", etag='"v2"')
    message = refused(url)
    assert f"has other content: its sha256 is {hashlib.sha256(DATA + b'x').hexdigest()}, at its first use (" in message
    assert f"it was {SHA256}; nothing was loaded; if the change is meant, delete that file" in message
    note = Path(message.partition("first use (")[2].partition(")")[0])
    note.unlink()
    assert fetch(url).read_bytes() == DATA + b"x"


@pytest.mark.parametrize("written", ["{", "[]", '{"source": "x"}', '{"source": "x", "sha256": "../../etc"}'])
def test_a_damaged_note(url: str, written: str, tmp_path: Path) -> None:
    fetch(url)
    (note,) = (tmp_path / "cache" / "sources").iterdir()
    note.write_text(written)
    message = refused(url, offline=True)
    assert message.startswith(f"{note} is damaged (")
    assert message.endswith(f"delete it, and {url} is fetched anew")


def test_offline_opens_no_socket(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_socket(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    path = fetch(url)
    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.setattr(socket, "create_connection", no_socket)
    monkeypatch.setenv("DEQ_ZOO_OFFLINE", "1")
    assert fetch(url) == path
    note = tmp_path / "empty" / "sources"
    message = refused(url, cache_dir=tmp_path / "empty")
    assert message.startswith(f"{url} is not in the cache (it would be noted in {note}")
    assert not (tmp_path / "empty").exists()

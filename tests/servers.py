"""Real servers on loopback for tests: one of files, good and bad at will, and a stand-in of the Hugging Face hub."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What a server answers for one path.

    Attributes:
        data: the whole content.
        etag: None of a server that names no version.
        ranges: whether parts are served.
        cuts: the connection closes after so many bytes of the body, one number a request, until there are none left.
        status: instead of 200 or 206.
        headers: more of them, or others; None leaves one out.
        pauses: whether the server stops in the middle of the body until it is closed.
        waits: seconds before the answer.
    """

    data: bytes = b""
    etag: str | None = '"v1"'
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    pauses: bool = False
    waits: float = 0.0


@dataclass
class Asked:
    """One request that came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Server(ThreadingHTTPServer):
    """Serves ``replies`` by path, and keeps what it was ``asked``."""

    daemon_threads = False  # closing waits for every answer, so that no socket is left over

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: dict[str, Reply] = {}
        self.asked: list[Asked] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def reply(self, asked: Asked) -> Reply:
        return self.replies.get(asked.path.partition("?")[0], Reply(b"nothing here", status=404))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = Asked(self.command, self.path, {key.lower(): value for key, value in self.headers.items()}, body)
        self.server.asked.append(asked)
        reply = self.server.reply(asked)
        self.server.closing.wait(reply.waits)
        data, status = reply.data, reply.status or 200
        headers: dict[str, str | None] = {"ETag": reply.etag, "Connection": "close"}
        wanted = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("range", ""))
        if wanted and reply.ranges and asked.headers.get("if-range", reply.etag) == reply.etag:
            start = int(wanted[1])
            status = 206 if start < len(data) else 416
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:] if status == 206 else b""
        headers["Content-Length"] = str(len(data))
        self.send_response(status)
        for key, value in {**headers, **reply.headers}.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = reply.cuts.pop(0) if reply.cuts else len(data) // 2 if reply.pauses else len(data)
        self.wfile.write(data[:end])
        if reply.pauses:
            self.server.closing.wait(30)
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - the base class's names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Be quiet."""


@contextmanager
def serving(server: Server | None = None) -> Iterator[Server]:
    """A server that runs until the block ends."""
    server = server or Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


# ------------------------------------------------------------------------------------------------- Hugging Face's hub


class Hub(Server):
    """The part of the hub's protocol that loading and uploading need.

    Attributes:
        repos: repository -> commit -> file -> content.
        refs: repository -> branch -> commit.
        gated: repositories that want their terms accepted.
        cdn: how large files are sent; replace it to send others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.cdn: dict[str, Reply] = {}

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; the commit's name."""
        commits, refs = self.repos.setdefault(repo, {}), self.refs.setdefault(repo, {})
        before = commits[refs[branch]] if branch in refs else {}
        name = hashlib.sha1(f"{repo}/{branch}/{len(commits)}".encode(), usedforsecurity=False).hexdigest()
        commits[name] = {**before, **files}
        refs[branch] = name
        return name

    def reply(self, asked: Asked) -> Reply:
        path = asked.path.partition("?")[0]
        if found := re.fullmatch(r"/cdn/(\w{64})", path):
            return self.cdn[found[1]]
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(found[1], found[2].replace("%2F", "/"), found[3])
        if path.startswith("/api/"):
            return self._api(path, asked)
        return Reply(status=404)

    def _file(self, repo: str, revision: str, file: str) -> Reply:
        if repo in self.gated:
            return _error(403, "GatedRepo")
        if repo not in self.repos:
            return _error(404, "RepoNotFound")
        commit = self.refs[repo].get(revision, revision)
        if commit not in self.repos[repo]:
            return _error(404, "RevisionNotFound")
        named: dict[str, str | None] = {"X-Repo-Commit": commit}
        if file not in self.repos[repo][commit]:
            return _error(404, "EntryNotFound", named)
        data = self.repos[repo][commit][file]
        if not file.endswith(".safetensors") or len(data) < 4096:  # kept in git itself
            sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            return Reply(data, etag=f'"{sha1}"', headers=named)
        sha256 = hashlib.sha256(data).hexdigest()
        self.cdn.setdefault(sha256, Reply(data, etag='"of the cdn"'))
        cdn = self.url.replace("127.0.0.1", "localhost") + "/cdn"  # another host, as far as its client can tell
        large = {
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{cdn}/{sha256}",
        }
        return Reply(status=302, headers={**named, **large})

    def _api(self, path: str, asked: Asked) -> Reply:
        if not asked.headers.get("authorization", "").startswith("Bearer hf_"):
            return _error(401, None, {"X-Error-Message": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            made = json.loads(asked.body)
            repo = f"{made['organization']}/{made['name']}" if made.get("organization") else made["name"]
            if repo in self.repos:
                return _json({"error": "You already created this model repo", "url": f"{self.url}/{repo}"}, 409)
            self.commit(repo, {".gitattributes": b""})
            return _json({"url": f"{self.url}/{repo}"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        if not found or found[1] not in self.repos:
            return _error(404, "RepoNotFound")
        repo, verb, branch = found.groups()
        return self._change(repo, verb, branch.replace("%2F", "/"), asked.body)

    def _change(self, repo: str, verb: str, branch: str, body: bytes) -> Reply:
        if verb == "branch":
            self.refs[repo].setdefault(branch, self.refs[repo]["main"])
            return _json({})
        if verb == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return _json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        name = self.commit(repo, files, branch)
        return _json({"success": True, "commitOid": name, "commitUrl": f"{self.url}/{repo}/commit/{name}"})


def _error(status: int, code: str | None, headers: dict[str, str | None] | None = None) -> Reply:
    return Reply(b"{}", etag=None, status=status, headers={"X-Error-Code": code, **(headers or {})})


def _json(value: object, status: int = 200) -> Reply:
    return Reply(json.dumps(value).encode(), etag=None, status=status, headers={"Content-Type": "application/json"})

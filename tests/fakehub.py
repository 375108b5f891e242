"""A Hugging Face hub on loopback: what the real client asks of the real one to download a model, and how that fails."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_someone_who_may"
_STEP = 64 * 1024


@dataclass
class Repo:
    """The files of one model by commit, and what its branches name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """`url` is for HF_ENDPOINT. What follows it may be changed while the hub runs."""

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Beginning of a path → the status and headers that answer it, whatever lies there."""
    answers: dict[str, object] = field(default_factory=dict)
    """Beginning of a path → the JSON that answers it in place of what lies there."""
    cuts: dict[str, int] = field(default_factory=dict)
    """Name of a file → the byte at which every connection that sends it ends."""
    resets: bool = False
    """Whether a cut connection is reset instead of closed."""
    bytes_sent: dict[str, int] = field(default_factory=dict)
    """Name of a large file → how many bytes of it have been sent, all requests together."""

    def add(self, name: str, folder: Path, *, branch: str = "main", gated: bool = False) -> str:
        """Publish the files below `folder`; returns the commit."""
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo())
        repo.commits[commit], repo.branches[branch], repo.gated = files, commit, gated
        return commit

    def ranges(self, name: str) -> list[str | None]:
        """The Range header of every request for the content of a file."""
        etag = {_etag(files[name]) for repo in self.repos.values() for files in repo.commits.values() if name in files}
        wanted = (name, *etag)
        return [one.range for one in self.requests if one.method == "GET" and one.path.endswith(wanted)]


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers until the block ends."""

    class Bound(_Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Bound) as server:
        server.daemon_threads = True
        hub = Bound.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Refused(Exception):
    """Another answer than the one that was asked for."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        try:
            for beginning, (status, headers) in self.hub.refusals.items():
                if path.startswith(beginning):
                    raise _Refused(status, headers)
            for beginning, value in self.hub.answers.items():
                if path.startswith(beginning):
                    return self._json(value)
            if token not in (None, TOKEN) and not path.startswith("/cdn/"):
                raise _Refused(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            if path.startswith("/cdn/"):
                self._blob(path.removeprefix("/cdn/"), token)
            elif path.startswith("/api/models/"):
                self._api(path.removeprefix("/api/models/"), token)
            elif path.count("/") > 4 and "/resolve/" in path:
                self._resolve(path.removeprefix("/"), token)
            else:
                raise _Refused(404, {"X-Error-Message": "Nothing that a model is downloaded with"})
        except _Refused as refused:
            status, headers = refused.args
            self._send(status, b"<html>no</html>" if "html" in headers.get("Content-Type", "") else b"{}", headers)

    def _repo(self, name: str, token: str | None) -> Repo:
        if name not in self.hub.repos:
            # To who has no token, a private repository and none at all are the same.
            raise _Refused(404 if token else 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
        return self.hub.repos[name]

    def _commit(self, repo: Repo, revision: str) -> str:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise _Refused(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        return commit

    def _api(self, path: str, token: str | None) -> None:
        """ORG/NAME, ORG/NAME/revision/REV: what the model is. ORG/NAME/tree/REV[/FOLDER]: its files [in there]."""
        org, name, *rest = path.split("/")
        kind, revision, *folder = rest or ("revision", "main")
        repo = self._repo(f"{org}/{name}", token)
        commit = self._commit(repo, revision)
        files = repo.commits[commit]
        if kind == "tree":
            files = {file: content for file, content in files.items() if file.startswith("/".join(folder))}
            if not files:
                raise _Refused(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "No such folder"})
            self._json([_entry(file, content) for file, content in sorted(files.items())])
        else:
            about = {"private": False, "gated": "manual" if repo.gated else False, "disabled": False, "tags": []}
            about["siblings"] = [{"rfilename": file} for file in sorted(files)]
            self._json({"id": f"{org}/{name}", "sha": commit, "downloads": 0, "likes": 0, **about})

    def _resolve(self, path: str, token: str | None) -> None:
        """ORG/NAME/resolve/REV/FILE: a small file itself; of a large one, on which other host it lies."""
        org, name, _, revision, file = path.split("/", 4)
        repo = self._repo(f"{org}/{name}", token)
        commit = self._commit(repo, revision)
        headers = {"X-Repo-Commit": commit}
        if repo.gated and token != TOKEN:
            raise _Refused(403 if token else 401, headers | {"X-Error-Code": "GatedRepo", "X-Error-Message": "Gated"})
        content = repo.commits[commit].get(file)
        if content is None:
            raise _Refused(404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        if not _is_large(file):
            self._send(200, content, headers | {"ETag": f'"{_git(content)}"'})
            return
        etag = _etag(content)
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag}"'}
        self._send(302, b"", headers | linked | {"Location": f"{elsewhere}/cdn/{etag}"})

    def _blob(self, etag: str, token: str | None) -> None:
        """A large file, whole or from a byte on, as far as this hub's connections reach."""
        if token is not None:
            raise _Refused(400, {"X-Error-Message": "a token was sent to another host than the hub"})
        every = (files.items() for repo in self.hub.repos.values() for files in repo.commits.values())
        name, content = next((name, content) for files in every for name, content in files if _etag(content) == etag)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        end = min(len(content), self.hub.cuts.get(name, len(content)))
        self.send_response(206 if start else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        for at in range(start, end, _STEP):
            piece = content[at : min(at + _STEP, end)]
            self.wfile.write(piece)
            self.hub.bytes_sent[name] = self.hub.bytes_sent.get(name, 0) + len(piece)
        if end < len(content):
            self.wfile.flush()
            if self.hub.resets:  # SO_LINGER of no seconds: what is closed is reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _is_large(name: str) -> bool:
    """Whether the hub keeps a file in its large storage, by its name as .gitattributes say it."""
    return name.endswith((".safetensors", ".bin", ".gguf"))


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": _git(content)}
    if _is_large(name):
        entry["lfs"] = {"oid": _etag(content), "size": len(content), "pointerSize": 134}
    return entry


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

"""A loopback stand-in for the Hub: repositories, LFS, atomic commits, downloads, and faults on request.

It speaks as much of the Hub's HTTP as the real huggingface_hub client asks for when models are pushed and read. It
shows that client and package go together; it says nothing of how the Hub itself behaves.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
_LFS = (".safetensors", ".spm", ".png", ".onnx")


@dataclass(frozen=True)
class File:
    """One version of a file; its identity is git's for small ones, the sha256 for large ones."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repository:
    """Commits (id → files) and branches (name → id)."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        text = json.dumps([branch, len(self.commits), {name: file.etag for name, file in sorted(files.items())}])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


Fault = Callable[["Handler"], bool]
"""Answers the request in its own way and says so, or leaves it alone."""


@dataclass
class Hub:
    """What a server holds. `faults`: (method, pattern of the path, fault), asked in order. `log`: what was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[tuple[str, str, Fault]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def make(self, name: str, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        return repository

    def asked(self, pattern: str) -> int:
        """How often."""
        return sum(re.search(pattern, line) is not None for line in self.log)


def status(code: int, times: int = 10**6, **headers: str) -> Fault:
    """So many answers of that code."""
    left = [times]

    def fault(handler: "Handler") -> bool:
        if left[0] <= 0:
            return False
        left[0] -= 1
        handler.body()
        handler.reply(code, {"error": f"made up {code}"}, **headers)
        return True

    return fault


def reset(after: int = 1000, times: int = 10**6) -> Fault:
    """The connection breaks once so many bytes of the request's body have been read."""
    left = [times]

    def fault(handler: "Handler") -> bool:
        if left[0] <= 0:
            return False
        left[0] -= 1
        handler.rfile.read(min(after, int(handler.headers.get("Content-Length") or 0)))
        handler.hang_up()
        return True

    return fault


def stall(seconds: float = 2.0) -> Fault:
    """Nothing comes for so long; then the connection is closed."""

    def fault(handler: "Handler") -> bool:
        threading.Event().wait(seconds)  # not time.sleep, which tests may have made quick
        handler.close_connection = True
        return True

    return fault


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None: ...

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, code: int, content: Any = b"", size: int | None = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": size if size is not None else len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def hang_up(self) -> None:
        """The other end finds the connection broken."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def refuse(self, code: int, name: str) -> None:
        self.reply(code, {"error": name}, X_Error_Code=name, X_Error_Message=name)

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        for method, pattern, fault in self.hub.faults:
            if method in (self.command, "*") and re.search(pattern, path) and fault(self):
                return
        data = self.body()
        for pattern, answer in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                if not match.string.startswith(("GET", "HEAD")) and not self._known():
                    return self.refuse(401, "Unauthorized")
                with self.hub.lock:
                    return answer(self, data, **match.groupdict())
        self.refuse(404, "NotFound")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/objects/")

    def files(self, name: str, revision: str) -> tuple[str, dict[str, File]] | None:
        """The commit and its files; None once the request has been refused."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._known()):
            self.refuse(404 if self._known() else 401, "RepoNotFound")
            return None
        oid = repository.find(revision)
        if oid is None:
            self.refuse(404, "RevisionNotFound")
            return None
        return oid, repository.commits[oid]


def _create(h: Handler, data: bytes) -> None:
    asked = json.loads(data)
    name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
    if name in h.hub.repositories:
        return h.reply(409, {"error": "exists", "url": f"{h.hub.url}/{name}"})
    h.hub.make(name, bool(asked.get("private") or asked.get("visibility") == "private"))
    h.reply(200, {"url": f"{h.hub.url}/{name}", "name": name, "id": name})


def _branch(h: Handler, data: bytes, name: str, revision: str) -> None:
    repository = h.hub.repositories[name]
    repository.branches[revision] = repository.branches["main"]
    h.reply(200, {})


def _info(h: Handler, data: bytes, name: str, revision: str | None = None) -> None:
    if (found := h.files(name, revision or "main")) is None:
        return
    oid, files = found
    siblings = [{"rfilename": path, "size": len(f.data), "blobId": f.oid, **_lfs(f)} for path, f in files.items()]
    about = {"private": h.hub.repositories[name].private, "gated": False, "disabled": False, "tags": [], "downloads": 0}
    h.reply(200, {"id": name, "modelId": name, "sha": oid, "siblings": siblings, "likes": 0, **about})


def _lfs(file: File) -> dict[str, Any]:
    size = len(file.data)
    return {"lfs": {"sha256": file.sha256, "oid": file.sha256, "size": size, "pointerSize": 134}} if file.lfs else {}


def _tree(h: Handler, data: bytes, name: str, revision: str) -> None:
    if (found := h.files(name, revision)) is not None:
        rows = [{"type": "file", "path": p, "oid": f.oid, "size": len(f.data), **_lfs(f)} for p, f in found[1].items()]
        h.reply(200, rows)


def _preupload(h: Handler, data: bytes, name: str, revision: str) -> None:
    if (found := h.files(name, revision)) is None:
        return
    answers = []
    for asked in json.loads(data)["files"]:
        there = found[1].get(asked["path"])
        mode = "lfs" if asked["path"].endswith(_LFS) else "regular"
        answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there and there.etag})
    h.reply(200, {"files": answers})


def _batch(h: Handler, data: bytes, name: str) -> None:
    objects = []
    for asked in json.loads(data)["objects"]:
        href = {"upload": {"href": f"{h.hub.url}/objects/{asked['oid']}", "header": {}}}
        objects.append({**asked, **({} if asked["oid"] in h.hub.objects else {"actions": href})})
    h.reply(200, {"transfer": "basic", "objects": objects})


def _put(h: Handler, data: bytes, oid: str) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        return h.refuse(400, "WrongDigest")
    h.hub.objects[oid] = data
    h.reply(200, {})


def _commit(h: Handler, data: bytes, name: str, revision: str) -> None:
    if (found := h.files(name, revision)) is None:
        return
    head, files = found[0], dict(found[1])
    for line in map(json.loads, data.splitlines()):
        value = line["value"]
        if line["key"] == "header" and value.get("parentCommit") not in (None, head):
            return h.refuse(412, "PreconditionFailed")
        if line["key"] == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif line["key"] == "lfsFile":
            if value["oid"] not in h.hub.objects:
                return h.refuse(400, "LfsObjectMissing")
            files[value["path"]] = File(h.hub.objects[value["oid"]], True)
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    oid = h.hub.repositories[name].commit(revision, files)
    h.reply(200, {"success": True, "commitOid": oid, "commitUrl": f"{h.hub.url}/{name}/commit/{oid}"})


def _resolve(h: Handler, data: bytes, name: str, revision: str, path: str) -> None:
    if (found := h.files(name, revision)) is None:
        return
    oid, files = found
    if path not in files:
        return h.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
    file = files[path]
    headers = {"ETag": f'"{file.etag}"', "X_Repo_Commit": oid}
    if file.lfs:
        headers |= {"X_Linked_ETag": f'"{file.etag}"', "X_Linked_Size": str(len(file.data))}
    h.reply(200, file.data, size=len(file.data), **headers)


_REPOSITORY, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES: dict[str, Callable[..., None]] = {
    "POST /api/repos/create": _create,
    "POST /api/validate-yaml": lambda h, data: h.reply(200, {"errors": [], "warnings": []}),
    rf"POST /api/models/{_REPOSITORY}/branch/{_REVISION}": _branch,
    rf"POST /api/models/{_REPOSITORY}/preupload/{_REVISION}": _preupload,
    rf"POST /api/models/{_REPOSITORY}/commit/{_REVISION}": _commit,
    rf"GET /api/models/{_REPOSITORY}/tree/{_REVISION}": _tree,
    rf"GET /api/models/{_REPOSITORY}/revision/{_REVISION}": _info,
    rf"GET /api/models/{_REPOSITORY}": _info,
    rf"POST /{_REPOSITORY}\.git/info/lfs/objects/batch": _batch,
    r"PUT /objects/(?P<oid>[0-9a-f]{64})": _put,
    rf"(GET|HEAD) /{_REPOSITORY}/resolve/{_REVISION}/(?P<path>.+)": _resolve,
}


@contextmanager
def running() -> Iterator[Hub]:
    """A server on a port of its own, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Handler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

"""A Hub on 127.0.0.1 that speaks the part of the real one's HTTP protocol that pushing and downloading need.

It runs in a thread of the test, holds everything in memory, and stops with the test. Repositories have branches of
``{path: bytes}``; large files go through the LFS batch endpoint and become visible only with the commit that names
them. Faults are queued with :meth:`Hub.fail`: a status code, or ``"cut"``, which closes the connection in the middle
of a body.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

TOKEN = "hf_testtokenthatmustnevershow"
READ_ONLY = "hf_readonlytokenofsomebody"


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[tuple[str, str]] = field(default_factory=list)  # branch, message


@dataclass
class Fault:
    method: str
    path: str
    what: int | str
    times: int
    headers: dict[str, str]


class Hub:
    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.lock = threading.Lock()
        self.on_put: Callable[[], None] = lambda: None

    def add(self, name: str, files: dict[str, bytes]) -> None:
        self.repos[name] = Repo(branches={"main": files})

    @staticmethod
    def commit_of(revision: str) -> str:
        """Return the commit of a branch, or `revision` if it is one: downloads ask for a branch's and go on by that."""
        return revision if re.fullmatch("[0-9a-f]{40}", revision) else hashlib.sha1(revision.encode()).hexdigest()

    def fail(self, method: str, path: str, what: int | str, times: int = 1, **headers: str) -> None:
        self.faults.append(Fault(method, path, what, times, headers))

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault(self.command, path)
        if fault is not None and fault.what == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            return self.connection.close()
        body = self.chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault is not None:
            return self.answer(int(fault.what), {"error": "asked for"}, fault.headers)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                with self.hub.lock:
                    return action(self, body, *match.groups())
        return self.answer(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return {TOKEN: "me", READ_ONLY: "reader"}.get(token)

    def may_write(self, name: str) -> bool:
        user = self.user()
        if user is None:
            self.answer(401, {"error": "Invalid username or password."})
        elif user != name.split("/")[0]:
            self.answer(403, {"error": f"You do not have write access to {name}"})
        elif name not in self.hub.repos:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            return True
        return False

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        user = self.user()
        if user is None:
            return self.answer(401, {"error": "Invalid username or password."})
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if name.split("/")[0] != user:
            return self.answer(403, {"error": "no rights"})
        if name in self.hub.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.repos[name] = Repo(private=asked.get("private") or asked.get("visibility") == "private")
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if self.may_write(name):
            there = self.hub.repos[name].branches
            status = 409 if branch in there else 200
            there.setdefault(branch, dict(there["main"]))
            self.answer(status)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self.may_write(name):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [{"path": n, "uploadMode": modes[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
            self.answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self.may_write(name):
            objects = []
            for item in json.loads(body)["objects"]:
                entry = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in self.hub.objects:
                    entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
                objects.append(entry)
            self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "wrong hash"})
        self.hub.objects[oid] = body
        self.hub.puts.append(oid)
        self.hub.on_put()
        return self.answer(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not self.may_write(name):
            return None
        repo = self.hub.repos[name]
        branch = revision
        if "create_pr=1" in (urlsplit(self.path).query or ""):
            branch = f"refs/pr/{sum(b.startswith('refs/pr') for b in repo.branches) + 1}"
            repo.branches[branch] = dict(repo.branches[revision])
        elif branch not in repo.branches:
            return self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        files = dict(repo.branches[branch])
        message = ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        repo.branches[branch] = files
        repo.commits.append((branch, message))
        oid = hashlib.sha1(body).hexdigest()
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        if branch.startswith("refs/pr"):
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{branch.rsplit('/', 1)[-1]}"
        return self.answer(200, answer)

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.user() != name.split("/")[0]):
            self.answer(404 if self.user() else 401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        by_commit = {Hub.commit_of(branch): held for branch, held in repo.branches.items()}
        files = by_commit.get(Hub.commit_of(revision))
        if files is None:
            self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        return files

    def tree(self, body: bytes, name: str, revision: str) -> None:
        files = self.files(name, revision)
        if files is not None:
            entries = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            self.answer(200, entries)

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        files = self.files(name, revision)
        if files is not None:
            siblings, sha = [{"rfilename": path} for path in files], Hub.commit_of(revision)
            self.answer(200, {"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        files = self.files(name, revision)
        if files is None:
            return None
        if path not in files:
            return self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        content, status, tag = files[path], 200, hashlib.sha256(files[path]).hexdigest()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            content, status = content[int(asked[1]) : int(asked[2] or len(content)) + 1], 206
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": Hub.commit_of(revision)}
        return self.answer(status, content, headers)

    def valid(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        good = text.startswith("---\n") and "\n---\n" in text
        self.answer(200 if good else 400, {"warnings": [], "errors": [] if good else [{"message": "no metadata"}]})


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler.put),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("GET", rf"/api/models/{NAME}/tree/(.+)", Handler.tree),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("POST", r"/api/validate-yaml", Handler.valid),
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running Hub that huggingface_hub talks to instead of the real one; retries do not wait."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.hub = made = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def tokens() -> dict[str, str]:
    return {"write": TOKEN, "read": READ_ONLY}

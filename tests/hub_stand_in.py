"""A Hugging Face Hub of one thread on this machine: the part of its file API that huggingface_hub needs to push and to fetch.

After https://huggingface.co/docs/hub/api and the requests that the library sends: create a repository, ask how files are
uploaded, large files by git-lfs, a commit as lines of JSON; a tree, and files with the headers that its cache is kept by.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)     # id -> every file at that commit
    refs: dict[str, str] = field(default_factory=dict)                     # branch or tag -> id

    def commit(self, files: dict[str, bytes]) -> str:
        before = self.at("main") or {}
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.refs["main"] = {**before, **files}, oid
        return oid

    def at(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))


class StandIn:
    """`url` while the block lasts; `repositories` is what it holds, `requests` what it was asked: "GET /path"."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}                                  # git-lfs: sha256 -> bytes
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """From here on nobody answers."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        return self.repositories.setdefault(name, Repository(private)).commit(files)


class Handler(BaseHTTPRequestHandler):
    """One request per connection (HTTP/1.0), so that a stand-in that was closed answers nothing more."""

    hub: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: Any = b"", error: str = "", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        routes = (
            ("POST", r"/api/repos/create", self.create, True),
            ("POST", r"/api/validate-yaml", self.validate, False),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", self.preupload, True),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch, True),
            ("PUT", r"/lfs/(\w+)", self.store, False),                     # a signed address: no token travels there
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", self.commit, True),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/(.+)", self.tree, False),
            ("GET", r"/api/models/([^/]+/[^/]+)", self.info, False),
            ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", self.resolve, False),
        )
        for method, pattern, handler, needs_token in routes:
            found = re.fullmatch(pattern, path)
            if found and re.fullmatch(method, self.command):
                if needs_token and not self.known:
                    return self.answer(401, {"error": "Invalid username or password."})
                return handler(*found.groups())
        return self.answer(501, {"error": f"the stand-in has no {self.command} {path}"})

    def create(self) -> None:
        asked = json.loads(self.content)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "somebody-else":
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = Repository(bool(asked.get("private") or asked.get("visibility") == "private"))
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        front = yaml.safe_load(json.loads(self.content)["content"].split("---\n")[1])
        wrong = not isinstance(front, dict) or front.get("license") not in ("mit", "apache-2.0", "other", "unknown")
        return self.answer(400 if wrong else 200, {"errors": [{"message": '"license" must be one of ...'}] if wrong else []})

    def preupload(self, name: str) -> None:
        files = [file["path"] for file in json.loads(self.content)["files"]]
        modes = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in files}
        return self.answer(200, {"files": [{"path": f, "uploadMode": mode, "shouldIgnore": False} for f, mode in modes.items()]})

    def batch(self, name: str) -> None:
        objects = json.loads(self.content)["objects"]
        ways = [{**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}} for one in objects]
        return self.answer(200, {"transfer": "basic", "objects": ways})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.content).hexdigest() != oid:
            return self.answer(400)
        self.hub.large[oid] = self.content
        return self.answer(200)

    def commit(self, name: str) -> None:
        files = {}
        for line in self.content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        oid = self.hub.repositories[name].commit(files)
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def visible(self, name: str) -> Repository | None:
        """The repository, or an answer that does not tell whether it is private or is not."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.known):
            self.answer(404 if self.known else 401, {"error": "Repository not found"}, "RepoNotFound")
            return None
        return found

    def info(self, name: str) -> None:
        found = self.visible(name)
        if found is not None:
            about = {"id": name, "modelId": name, "private": found.private, "sha": found.refs.get("main")}
            self.answer(200, {**about, "siblings": []})

    def tree(self, name: str, revision: str) -> None:
        found = self.visible(name)
        if found is None:
            return
        files = {} if not found.commits else found.at(revision)
        if files is None:
            return self.answer(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
        return self.answer(200, [{"type": "file", "path": p, "size": len(b), "oid": _git_sha1(b)} for p, b in files.items()])

    def resolve(self, name: str, revision: str, file: str) -> None:
        found = self.visible(name)
        if found is None:
            return
        files = found.at(revision)
        if files is None:
            return self.answer(404, error="RevisionNotFound")
        oid = found.refs.get(revision, revision)
        if file not in files:
            return self.answer(404, error="EntryNotFound", X_Repo_Commit=oid)
        data = files[file]
        etag = hashlib.sha256(data).hexdigest() if file.endswith(".safetensors") else _git_sha1(data)
        linked = {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(data))}
        return self.answer(200, data, X_Repo_Commit=oid, ETag=f'"{etag}"', **linked)


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

"""The part of the Hugging Face Hub's HTTP API that publishing and loading a model use, on loopback and in memory.

Accounts are tokens: ``TOKEN`` may write to everything, ``READER`` only read. Small text files travel in the commit,
others (``*.safetensors``, ``tokenizer.json``) by git LFS. There is no Xet storage: no answer offers it, and clients
run with HF_HUB_DISABLE_XET=1.

``server.received`` has the bodies of all requests. ``server.drop`` maps ``(method, part of a path)`` to a number of
times that such a request is broken off in the middle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, READER = "hf_test", "hf_reader"
LICENSES = {"apache-2.0", "mit", "cc-by-nc-4.0"}


@dataclass
class Repository:
    """Commits by branch and by id; a commit is ``{path: content}``."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        text = repr((branch, len(self.commits), sorted((path, sha(content)) for path, content in files.items())))
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class HubHandler(BaseHTTPRequestHandler):
    """``server.repositories`` are ``{"org/name": Repository}``, ``server.blobs`` what LFS received, by sha256."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.parts()
        if self.token() not in (None, TOKEN, READER):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if parts[:2] == ["api", "whoami-v2"]:
            return self.answer({"name": "org", "type": "user"}) if self.token() else self.refuse(401)
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.token() is None):
            return self.refuse(404 if self.token() else 401, "RepoNotFound")
        rest = parts[4:] if is_api else parts[2:]
        revision = rest[1] if len(rest) > 1 and rest[0] in ("revision", "tree", "resolve") else "main"
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if rest[:1] == ["tree"]:
            return self.answer([entry(path, content) for path, content in files.items()])
        if is_api:
            siblings = [{"rfilename": path} for path in files]
            return self.answer({"id": name, "modelId": name, "sha": commit, "siblings": siblings})
        self.send_file(files.get("/".join(rest[2:])), "/".join(rest[2:]), commit)

    def send_file(self, content: bytes | None, path: str, commit: str):
        if content is None:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"ETag": f'"{sha(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_lfs(path):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha(content)}"'}
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.respond(206 if first else 200, content[first:], {"Content-Type": "application/octet-stream", **headers})

    def do_POST(self):
        body = self.read_body()
        if body is None:
            return
        parts = self.parts()
        if parts == ["api", "validate-yaml"]:
            errors = card_errors(json.loads(body)["content"])
            listed = {"errors": [{"message": error} for error in errors], "warnings": []}
            return self.answer(listed, 400 if errors else 200)
        if self.token() not in (TOKEN, READER):
            return self.refuse(401, message="Invalid credentials in Authorization header" if self.token() else "")
        if self.token() == READER:
            return self.refuse(403, message="Forbidden: pass a token with write access")
        if parts == ["api", "repos", "create"]:
            request = json.loads(body)
            name = f"{request.get('organization') or 'org'}/{request['name']}"
            created = {"url": f"http://{self.headers['Host']}/{name}", "name": name}
            if name in self.server.repositories:
                return self.answer({**created, "error": "You already created this model repo"}, 409)
            self.server.repositories[name] = Repository(private=request.get("visibility") == "private")
            return self.answer(created)
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self.answer(
                {"transfer": "basic", "objects": list(map(self.lfs_object, json.loads(body)["objects"]))}
            )
        name, verb, revision = "/".join(parts[2:4]), parts[4], parts[5]
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        if verb == "branch":
            if revision in repository.branches:
                return self.refuse(409)
            repository.branches[revision] = repository.branches["main"]
            return self.answer({})
        if revision not in repository.branches:
            return self.refuse(404, "RevisionNotFound")
        if verb == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": p, "uploadMode": "lfs" if is_lfs(p) else "regular", "shouldIgnore": False} for p in paths
            ]
            return self.answer({"files": modes})
        if verb == "commit":
            return self.commit(name, repository, revision, [json.loads(line) for line in body.splitlines()])
        self.refuse(404)

    def lfs_object(self, wanted: dict) -> dict:
        if wanted["oid"] in self.server.blobs:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"http://{self.headers['Host']}/blobs/{wanted['oid']}"}}}

    def do_PUT(self):
        body = self.read_body()
        if body is None:
            return
        oid = self.parts()[1]
        if sha(body) != oid:
            return self.refuse(400, message="The content is not what was announced")
        self.server.blobs[oid] = body
        self.answer({})

    def commit(self, name: str, repository: Repository, branch: str, lines: list[dict]):
        files = dict(repository.commits[repository.branches[branch]])
        for value, key in ((line["value"], line["key"]) for line in lines):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return self.refuse(400, message=f"{value['path']} was never uploaded")
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        url = f"http://{self.headers['Host']}/{name}"
        created = {}
        if "create_pr" in parse_qs(urlsplit(self.path).query):
            number = sum(known.startswith("refs/pr/") for known in repository.branches) + 1
            branch = f"refs/pr/{number}"
            created = {"pullRequestUrl": f"{url}/discussions/{number}"}
        oid = repository.commit(branch, files)
        self.answer({"success": True, "commitUrl": f"{url}/commit/{oid}", "commitOid": oid, **created})

    def parts(self) -> list[str]:
        return [unquote(part).removesuffix(".git") for part in urlsplit(self.path).path.strip("/").split("/")]

    def token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def dropped(self) -> bool:
        for (method, part), times in self.server.drop.items():
            if times and method == self.command and part in self.path:
                self.server.drop[method, part] -= 1
                self.server.dropped += 1
                return True
        return False

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes | None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.dropped():
            self.rfile.read(length // 2)
            return self.hang_up()
        body = b""
        if self.headers.get("Transfer-Encoding") != "chunked":
            body = self.rfile.read(length)
        else:
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.received.append(body)
        return body

    def answer(self, content, status: int = 200) -> None:
        self.respond(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str = "", headers=None, message: str = "") -> None:
        self.respond(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message or code, **(headers or {})})

    def respond(self, status: int, payload: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.command == "GET" and self.dropped():
            self.wfile.write(payload[: len(payload) // 2])
            return self.hang_up()
        self.wfile.write(payload)


def card_errors(card: str) -> list[str]:
    """The Hub's rules for the metadata of a model card, as far as this package's cards could break them."""
    if not card.startswith("---\n"):
        return ["there is no metadata"]
    data = yaml.safe_load(card.split("---\n")[1])
    errors = [f"{key} must be a list" for key in ("tags", "datasets") if not isinstance(data.get(key, []), list)]
    if data.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    for base in [data.get("base_model", "org/name")]:
        if not isinstance(base, str) or base.count("/") > 1 or base.startswith(("/", ".")):
            errors.append(f'"base_model" with value {base!r} is not valid')
    return errors


def entry(path: str, content: bytes) -> dict:
    large = {"lfs": {"oid": sha(content), "size": len(content), "pointerSize": 130}} if is_lfs(path) else {}
    return {"type": "file", "path": path, "size": len(content), "oid": sha(content), **large}


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", "tokenizer.json"))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def hub_server() -> Iterator[ThreadingHTTPServer]:
    """A running Hub; ``server.url`` is its endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.repositories, server.blobs, server.drop, server.dropped = {}, {}, {}, 0
    server.received = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def online(server: ThreadingHTTPServer, home: object, token: str | None = TOKEN) -> dict[str, str]:
    """The environment of a process that uses ``server`` with an empty cache in ``home``."""
    access = {"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        **access,
    }

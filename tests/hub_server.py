"""The part of the Hugging Face Hub's HTTP API that publishing and loading a model use, on loopback and in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


class HubHandler(BaseHTTPRequestHandler):
    """Repositories live in ``server.repositories``: ``{"org/name": {"private": bool, "files": {path: bytes}}}``."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            return self.answer({"name": "org", "type": "user"}) if self.authorized() else self.refuse(401)
        if parts[:2] == ["api", "models"]:
            repository = self.repository("/".join(parts[2:4]))
            if repository is None:
                return self.refuse(404, "RepoNotFound")
            if parts[4:5] == ["tree"]:
                return self.answer(
                    [
                        {"type": "file", "path": p, "size": len(c), "oid": sha(c)}
                        for p, c in repository["files"].items()
                    ]
                )
            siblings = [{"rfilename": path} for path in repository["files"]]
            name = "/".join(parts[2:4])
            return self.answer({"id": name, "modelId": name, "sha": repository["commit"], "siblings": siblings})
        repository = self.repository("/".join(parts[:2]))
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        content = repository["files"].get("/".join(parts[4:]))
        if content is None:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": repository["commit"]})
        self.answer(content, {"ETag": f'"{sha(content)}"', "X-Repo-Commit": repository["commit"]})

    def do_POST(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if parts == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if not self.authorized():
            return self.refuse(401)
        if parts == ["api", "repos", "create"]:
            request = json.loads(body)
            name = f"{request.get('organization') or 'org'}/{request['name']}"
            private = request.get("visibility") == "private" or bool(request.get("private"))
            new = {"private": private, "files": {}, "commit": "0" * 40}
            self.server.repositories.setdefault(name, new)
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        name = "/".join(parts[2:4])
        if name not in self.server.repositories:
            return self.refuse(404, "RepoNotFound")
        if parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if parts[4] == "commit":
            repository = self.server.repositories[name]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repository["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            repository["commit"] = sha(body)[:40]
            url = f"http://{self.headers['Host']}/{name}/commit/{repository['commit']}"
            return self.answer({"success": True, "commitUrl": url, "commitOid": repository["commit"]})
        self.refuse(404)

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str):
        found = self.server.repositories.get(name)
        return found if found and (self.authorized() or not found["private"]) else None

    def answer(self, content, headers=None) -> None:
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.respond(200, payload, {"Content-Type": kind, **(headers or {})})

    def refuse(self, status: int, code: str = "", headers=None) -> None:
        self.respond(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def respond(self, status: int, payload: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def hub_server() -> Iterator[ThreadingHTTPServer]:
    """A running Hub; ``server.url`` is its endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.repositories = {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

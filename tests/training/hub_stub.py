"""A hub on loopback: as much of its upload protocol as huggingface_hub needs, and its faults on demand."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

OWNER, TOKEN = "ada", "hf_stub"
COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """repos: id -> private. files: "owner/name" -> path -> content. faults: taken one for each creation."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.faults: list[int] = []
        self.hanging = threading.Event()
        self.released = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, fields: dict[str, object]) -> None:
        content = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid username or password."})
        return False

    def do_GET(self) -> None:
        repo = urlsplit(self.path).path.removeprefix("/api/models/")
        if self.allowed() and repo in self.server.repos:
            self.answer(200, {"id": repo, "private": self.server.repos[repo], "sha": COMMIT, "tags": []})

    def do_PUT(self) -> None:
        self.server.objects[self.path.split("/")[-1]] = self.body()
        self.answer(200, {})

    def do_POST(self) -> None:
        body, path = self.body(), urlsplit(self.path).path
        if not self.allowed():
            return
        if self.server.hanging.is_set():
            self.server.released.wait(60)
        words = path.strip("/").split("/")
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "preupload" in words:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for one in files
            ]
            self.answer(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.endpoint}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "commit" in words:
            self.commit("/".join(words[2:4]), body)

    def create(self, asked: dict[str, object]) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else 0
        if fault:
            self.answer(fault, {"error": "stumbled"})
            return
        repo = f"{asked['organization'] or OWNER}/{asked['name']}"
        private = asked.get("visibility", asked.get("private")) in ("private", True)
        known = repo in self.server.repos
        self.server.repos.setdefault(repo, private)
        self.answer(409 if known else 200, {"url": f"{self.server.endpoint}/{repo}", "name": repo})

    def commit(self, repo: str, body: bytes) -> None:
        held = self.server.files.setdefault(repo, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = self.server.objects[value["oid"]]
        self.answer(200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

"""A hub on loopback: as much of its upload protocol as huggingface_hub needs, and its faults on
demand.
"""

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


class UploadHub(ThreadingHTTPServer):
    """repos: id -> private. files: "owner/name" -> path -> content. faults: taken one for each
    creation.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), UploadHubHandler)
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.faults: list[int] = []
        self.hang = threading.Event()
        self.release = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve_upload_hub() -> Iterator[UploadHub]:
    hub = UploadHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        hub.shutdown()
        hub.server_close()


class UploadHubHandler(BaseHTTPRequestHandler):
    server: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send_json(self, status: int, fields: dict[str, object]) -> None:
        content = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def check_token(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.send_json(401, {"error": "Invalid username or password."})
        return False

    def do_GET(self) -> None:
        repo = urlsplit(self.path).path.removeprefix("/api/models/")
        if self.check_token() and repo in self.server.repos:
            self.send_json(
                200, {"id": repo, "private": self.server.repos[repo], "sha": COMMIT, "tags": []}
            )

    def do_PUT(self) -> None:
        self.server.objects[self.path.split("/")[-1]] = self.read_body()
        self.send_json(200, {})

    def do_POST(self) -> None:
        body, path = self.read_body(), urlsplit(self.path).path
        if not self.check_token():
            return
        if self.server.hang.is_set():
            self.server.release.wait(60)
        words = path.strip("/").split("/")
        if path == "/api/repos/create":
            self.create_repo(json.loads(body))
        elif path == "/api/validate-yaml":
            self.send_json(200, {"errors": [], "warnings": []})
        elif "preupload" in words:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs"
                    if one["path"].endswith((".safetensors", ".png"))
                    else "regular",
                    "shouldIgnore": False,
                }
                for one in files
            ]
            self.send_json(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **one,
                    "actions": {"upload": {"href": f"{self.server.endpoint}/objects/{one['oid']}"}},
                }
                for one in json.loads(body)["objects"]
            ]
            self.send_json(200, {"transfer": "basic", "objects": objects})
        elif "commit" in words:
            self.create_commit("/".join(words[2:4]), body)

    def create_repo(self, asked: dict[str, object]) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else 0
        if fault:
            self.send_json(fault, {"error": "stumbled"})
            return
        repo = f"{asked['organization'] or OWNER}/{asked['name']}"
        private = asked.get("visibility", asked.get("private")) in ("private", True)
        known = repo in self.server.repos
        self.server.repos.setdefault(repo, private)
        self.send_json(
            409 if known else 200, {"url": f"{self.server.endpoint}/{repo}", "name": repo}
        )

    def create_commit(self, repo: str, body: bytes) -> None:
        held = self.server.files.setdefault(repo, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = self.server.objects[value["oid"]]
        self.send_json(
            200,
            {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{COMMIT}", "commitOid": COMMIT},
        )

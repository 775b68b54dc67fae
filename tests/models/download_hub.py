"""A hub on loopback: model info, trees and files as huggingface.co answers them, with faults on
request.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
# as on the hub: with a sha256 for an ETag, and another host that sends the bytes
LFS_SUFFIX = ".safetensors"


@dataclass
class DownloadHub:
    """folder: the repository's files. faults: what goes wrong, taken away once it has `times`
    times.

    Faults: "401", "429", "500" at any request; "gated" at questions; "cut", "short", "long" at large files.
    """

    folder: Path
    repo: str = "owner/chroma"
    revisions: tuple[str, ...] = ("main", "v2", COMMIT)
    fault: str = ""
    fault_count: int = 10**9
    token: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""
    cdn: str = ""  # by another name, or the library would take it for the hub itself

    def take_fault(self, *names: str) -> str:
        if self.fault not in names or self.fault_count <= 0:
            return ""
        self.fault_count -= 1
        return self.fault

    def files(self) -> dict[str, Path]:
        return {
            str(path.relative_to(self.folder)): path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }

    def fetched_files(self) -> set[str]:
        """Files whose bytes were asked for."""
        asked = [path for verb, path, _ in self.requests if verb == "GET"]
        found = (re.search(r"/(?:resolve|cdn)/[^/]+/(.+)", path) for path in asked)
        return {match[1] for match in found if match}


def tree_entry(name: str, path: Path) -> dict[str, object]:
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"type": "file", "oid": blob, "size": len(content), "path": name} | (
        {"lfs": lfs} if name.endswith(LFS_SUFFIX) else {}
    )


@contextmanager
def serve_download_hub(hub: DownloadHub) -> Iterator[DownloadHub]:
    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str = "", message: str = "") -> None:
            self.reply(status, b"{}", X_Error_Code=code, X_Error_Message=message or code)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range") or ""))
            if status := hub.take_fault("429", "500"):
                return self.refuse(int(status))
            told, signed = self.headers["Authorization"], path.startswith("/cdn/")
            if signed and told:
                return self.refuse(
                    400, message="a signed address takes no token, and must not be told one"
                )
            if hub.take_fault("401") or (
                hub.token and not signed and told != f"Bearer {hub.token}"
            ):
                return self.refuse(401, message="Invalid credentials in Authorization header")
            if path.startswith("/api/models/"):
                return self.about(path.removeprefix("/api/models/"))
            found = re.fullmatch(rf"/{hub.repo}/resolve/([^/]+)/(.+)|/cdn/([^/]+)/(.+)", path)
            if not found:
                return self.refuse(404, "RepoNotFound")
            return self.file(found[2] or found[4], direct=bool(found[4]))

        def about(self, rest: str) -> None:
            if not rest.startswith(hub.repo):
                return self.refuse(401, "RepoNotFound")  # the hub hides private ones so
            if hub.take_fault("gated"):
                return self.refuse(403, "GatedRepo")
            kind, _, revision = rest.removeprefix(hub.repo).strip("/").partition("/")
            if revision and revision.split("/")[0] not in hub.revisions:
                return self.refuse(404, "RevisionNotFound")
            listed = [tree_entry(name, path) for name, path in hub.files().items()]
            if kind == "tree":
                return self.reply(200, json.dumps(listed).encode(), Content_Type="application/json")
            siblings = [
                {"rfilename": one["path"], "size": one["size"], "blobId": one["oid"]}
                for one in listed
            ]
            told = {"id": hub.repo, "modelId": hub.repo, "sha": COMMIT, "private": False, "tags": [],
                    "siblings": siblings, "downloads": 0, "likes": 0}  # fmt: skip
            return self.reply(200, json.dumps(told).encode(), Content_Type="application/json")

        def file(self, name: str, direct: bool) -> None:
            if name not in hub.files():
                return self.refuse(404, "EntryNotFound")
            one = tree_entry(name, hub.files()[name])
            large = name.endswith(LFS_SUFFIX)
            etag = one["lfs"]["oid"] if large else one["oid"]  # type: ignore[index]
            told = {"X_Repo_Commit": COMMIT, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
            if large and not direct:
                length = (
                    int(str(one["size"])) - 7 * (hub.fault == "long") + 7 * (hub.fault == "short")
                )
                told |= {"X_Linked_Size": str(length), "X_Linked_ETag": f'"{etag}"'}
                return self.reply(302, Location=f"{hub.cdn}/cdn/{COMMIT}/{name}", **told)
            content = hub.files()[name].read_bytes()
            start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
            if start:
                told["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if large and self.command == "GET" and hub.take_fault("cut"):
                self.send_response(206 if start else 200)
                for key, value in {**told, "Content_Length": str(len(content) - start)}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content[start : start + (len(content) - start) // 2])
                self.close_connection = True
                return None
            return self.reply(206 if start else 200, content[start:], **told)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url, hub.cdn = (
        f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost")
    )
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

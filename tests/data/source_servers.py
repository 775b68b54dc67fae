"""What the tests of sources share: a small hub, tables, and a scan of one dataset."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.scan import ScanResult, scan_datasets
from simpletuner.events.event_types import Event, NoticeIssued
from tests.data.image_server import ImageServer
from tests.data.unusable_files import encode_image, noise_image

PNG = encode_image(noise_image(), "PNG")
OPTIONS = DataOptions(resolution=64, max_bad_sample_fraction=1)
KEYS = {"aws_access_key_id": "id-canary", "aws_secret_access_key": "secret-canary"}
COMMIT = "c" * 40
TOKEN = "hf_canary"
REPOSITORY = "owner/name"


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


class Scanner:
    """Scans one dataset, with one folder of copies for all scans."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self.waits: list[float] = []
        self.max_bytes = 1 << 30

    def read(self, **entry: Any) -> Any:
        file = self.folder / "multidatabackend.json"
        file.write_text(json.dumps([{"id": "p", **entry}]), encoding="utf-8")
        return read_dataset_file(file, OPTIONS, {})

    def scan(self, options: DataOptions = OPTIONS, **entry: Any) -> ScanResult:
        found = self.read(**entry)
        with RemoteStore(
            self.folder / "cache", self.events.append, self.max_bytes, self.waits.append
        ) as store:
            return scan_datasets(
                found.train, options, 0, self.events.append, alignment_px=64, store=store
            )

    def notices(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, NoticeIssued)]


class Hub:
    """Repositories of one server. files: revision -> path -> content."""

    def __init__(self, server: ImageServer) -> None:
        self.server = server
        self.card: dict[str, Any] = {}

    def fill(self, files: dict[str, bytes], revision: str = "main", commit: str = COMMIT) -> None:
        api = f"/api/datasets/{REPOSITORY}"
        info = {"id": REPOSITORY, "sha": commit, "cardData": self.card, "siblings": []}
        self.server.files[f"{api}/revision/{revision}"] = json.dumps(info).encode()
        tree = [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            for path, content in files.items()
        ]
        self.server.files[f"{api}/tree/{commit}"] = json.dumps(tree).encode()
        for path, content in files.items():
            self.server.files[f"/datasets/{REPOSITORY}/resolve/{commit}/{path}"] = content

    def path(self, name: str) -> str:
        return f"/datasets/{REPOSITORY}/resolve/{COMMIT}/{name}"


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    written = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(table, written, **options)
    return written.getvalue()


def image_rows(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": PNG + bytes([n]), "path": f"{n}.png"},
            "text": f"caption {n}",
            "collection": "photo" if n % 2 else "art",
            "width": 100 + n,
            "quality_assessment": {"clear": n / 10},
        }
        for n in range(first, first + count)
    ]


def pack(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()

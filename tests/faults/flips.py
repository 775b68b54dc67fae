"""Flipped bits in every kind of file that a run reads again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from simpletuner.adapters.lora_file import read_lora_file
from simpletuner.cache.content_hashes import ContentHashes
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.config.output_folder import RUN_MARKER, is_run_folder
from simpletuner.data.sources import LocalFile
from simpletuner.errors import ModelError
from simpletuner.events.event_log import EventLog, count_damaged_lines, read_events
from simpletuner.events.event_types import NoticeIssued, StepCompleted
from simpletuner.events.html_report import write_report
from simpletuner.events.sinks import null_emit
from simpletuner.models.chroma.module_names import CHROMA_MODULE_NAMES
from simpletuner.training import checkpoint
from simpletuner.training.own_files import replace_own_file
from tests.adapters.layout_files import make_all_layouts
from tests.faults.outcomes import Lost, Tally


def flip(generator: random.Random, data: bytes) -> bytes:
    """Flip one bit of a byte that is used: databases are padded with zeros."""
    content = bytearray(data)
    used = [at for at, byte in enumerate(content) if byte]
    content[generator.choice(used)] ^= 1 << generator.randrange(8)
    return bytes(content)


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(48, dtype=torch.float32) + step}


class Files:
    """One file of each kind, and what must hold after any bit of it was flipped."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "run"
        self.run.mkdir(parents=True)
        for step in (1, 2):
            snapshot = checkpoint.CheckpointData(step, {"weights": tensors(step)}, {"note": "x"})
            checkpoint.save_checkpoint(self.run, snapshot, None, keep=5)
        log = EventLog(self.run / "events.jsonl")
        for number in range(5):
            log.append(StepCompleted(number, 5, 0, 0.5, 1e-4, 0.1, 0.2, 1, 16.5))
        log.append(NoticeIssued("the end"))
        log.close()
        replace_own_file(self.run, "README.md", "card")
        with TensorStore(root / "store", "f", shard_mib=0.0002) as store:
            for number in range(6):
                store.put(f"k{number}", tensors(number))
        self.store = store.folder
        hashes = ContentHashes(root / "hashes")
        self.picture = LocalFile(root / "picture")
        self.picture.path.write_bytes(b"picture")
        self.digest = hashes.hash_file(self.picture)
        hashes.close()
        save_file(make_all_layouts(8)["kohya"].tensors, root / "lora.safetensors")
        self.kinds: dict[str, tuple[Path, Callable[[], None]]] = {
            "manifest": (self.run / "checkpoint-2" / "manifest.json", self.check_checkpoints),
            "state": (self.run / "checkpoint-2" / "state.json", self.check_checkpoints),
            "weights": (self.run / "checkpoint-2" / "weights.safetensors", self.check_checkpoints),
            "event log": (self.run / "events.jsonl", self.check_log),
            "marker": (self.run / RUN_MARKER, self.check_marker),
            "index": (self.store / "index.sqlite", self.check_store),
            "shard": (sorted(self.store.glob("shard-*"))[0], self.check_store),
            "content hashes": (root / "hashes" / "content.sqlite", self.check_hashes),
            "LoRA": (root / "lora.safetensors", self.check_lora),
        }

    def check_checkpoints(self) -> None:
        newest = checkpoint.find_latest_valid(self.run, null_emit)
        if newest is None:
            raise Lost("no checkpoint is sound any more")
        step = checkpoint.checkpoint_step(newest)
        found = torch.as_tensor(checkpoint.read_tensors(newest)["weights"]["x"])
        if not torch.equal(found, tensors(step)["x"]):
            raise Lost(f"the weights of step {step} are others")
        if checkpoint.read_state(newest)["step"] != step:
            raise Lost("the state is of another step")

    def check_log(self) -> None:
        events = list(read_events(self.run / "events.jsonl"))
        if len(events) < 4:
            raise Lost(f"{len(events)} of 6 events are left")
        count_damaged_lines(self.run / "events.jsonl")
        write_report(self.run)

    def check_marker(self) -> None:
        (self.run / "README.md").write_text("edited")
        replace_own_file(self.run, "README.md", "new card")
        kept = [path.read_text() for path in self.run.glob("earlier-*/README.md")]
        if not is_run_folder(self.run) or "edited" not in kept:
            raise Lost("the edited card is gone")

    def check_store(self) -> None:
        with TensorStore(self.root / "store", "f") as store:
            names = [f"k{number}" for number in range(6)]
            missing = set(store.missing_keys(names))
            for number, name in enumerate(names):
                if name not in missing and not torch.equal(
                    store.get(name)["x"], tensors(number)["x"]
                ):
                    raise Lost(f"{name} is another tensor")
            for number, name in enumerate(names):
                if name in missing:
                    store.put(name, tensors(number))

    def check_hashes(self) -> None:
        hashes = ContentHashes(self.root / "hashes")
        if hashes.hash_file(self.picture) != self.digest:
            raise Lost("the hash is another one")
        hashes.close()

    def check_lora(self) -> None:
        try:
            deltas = read_lora_file(self.root / "lora.safetensors", CHROMA_MODULE_NAMES).to_deltas()
        except ModelError:
            return
        if not all(bool(torch.isfinite(delta.up).all()) for delta in deltas.values()):
            raise Lost("values that are not finite were accepted")


def flips(generator: random.Random, root: Path, count: int) -> Tally:
    tally = Tally("flipped bits")
    shutil.rmtree(root, ignore_errors=True)
    files = Files(root)
    backup = root.with_name(f"{root.name}-backup")
    shutil.rmtree(backup, ignore_errors=True)
    shutil.copytree(root, backup)
    # A database is checked by opening it, which costs ten times as much as the others.
    weights = {"index": 1, "content hashes": 1, "shard": 2, "marker": 2}
    names = [name for name in files.kinds for _ in range(weights.get(name, 4))]
    for number in range(count):
        name = names[number % len(names)]
        path, check = files.kinds[name]
        sound = (backup / path.relative_to(root)).read_bytes()
        shutil.rmtree(root)
        shutil.copytree(backup, root)
        path.write_bytes(flip(generator, sound))
        tally.try_one(f"{name} number {number}", check)
    assert json.loads((backup / "run" / RUN_MARKER).read_text())
    return tally

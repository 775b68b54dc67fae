"""Trains nothing, and leaves a run folder as a training does: events, pictures, checkpoints, lock, exit.json.

python tests/server/fake_trainer.py --config PATH [--rehearse]

FAKE_STEPS    length, before max_train_steps of the configuration (default 20)
FAKE_STEP_S   seconds of a step (default 0.02)
FAKE_IMAGES   prompts that pictures are drawn for (default 2)
FAKE_OOM      host: killed by SIGKILL in the middle; cuda: torch's error and exit code 1
FAKE_DEAF     hears no request and no signal that it could ignore
FAKE_FAIL     ends with this exit code in the middle
FAKE_LATE     makes its run folder once this file is there
FAKE_GATE     makes its last step once this file is there
FAKE_LINGER_S seconds that the process still takes when the run has ended
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from simpletuner.events import types
from simpletuner.events.log import EventLog
from simpletuner.training.rundir import RunFolder, replace_folder

SETTINGS = {name: value for name, value in os.environ.items() if name.startswith("FAKE_")}
CUDA = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 11.00 GiB in total."


class Left(Exception):
    """Stopped on request."""


class Fake:
    def __init__(self, folder: RunFolder, config: dict[str, Any]) -> None:
        self.folder, self.config, self.stop = folder, config, False
        self.total = int(SETTINGS.get("FAKE_STEPS") or config.get("max_train_steps") or 20)
        self.step_s = float(SETTINGS.get("FAKE_STEP_S", "0.02"))
        self.prompts = [f"fake prompt {at}" for at in range(int(SETTINGS.get("FAKE_IMAGES", "2")))]
        self.every = int(config.get("checkpoint_step_interval") or max(1, self.total // 2))
        self.draw_every = int(config.get("validation_step_interval") or max(1, self.total // 2))
        self.deaf = "FAKE_DEAF" in SETTINGS
        self.step = 0
        self.emit = EventLog(folder.events)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.deaf:
            return
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def train(self) -> None:
        self.step = resumed = self.start_step()
        for name, unit in (("scan", "pictures"), ("encode text", "captions"), ("encode images", "images")):
            self.stage(name, unit)
        run_dir = str(self.folder.path)
        self.emit(types.RunStarted("0.1.0", run_dir, "fake", "cpu", self.total, resumed))
        if resumed:
            self.emit(types.Resumed(resumed, f"checkpoint-{resumed}"))
        else:
            self.draw("base")
        self.emit(types.StageStarted("train", self.total, "steps"))
        started = time.monotonic()
        while self.step < self.total:
            self.one_step()
        self.save()
        (self.folder.path / "pytorch_lora_weights.safetensors").write_bytes(weights(self.step))
        self.emit(types.Saved(self.step, "pytorch_lora_weights.safetensors", 0.01, 10))
        self.emit(types.Finished(self.step, time.monotonic() - started, "done"))

    def start_step(self) -> int:
        wanted = self.config.get("resume_from_checkpoint", "latest")
        if wanted.startswith("checkpoint-"):
            return int(wanted.removeprefix("checkpoint-"))
        found = [int(path.name.rpartition("-")[2]) for path in self.folder.path.glob("checkpoint-*")]
        return max(found, default=0)

    def stage(self, name: str, unit: str, count: int = 8) -> None:
        self.emit(types.StageStarted(name, count, unit))
        for done in range(1, count + 1):
            time.sleep(self.step_s / 8)
            self.emit(types.StageProgress(name, done, count, 100.0, 0.0))
            if self.asked():
                raise Left
        self.emit(types.StageDone(name, count, self.step_s))

    def asked(self) -> bool:
        return not self.deaf and (self.stop or self.folder.take_control("stop"))

    def one_step(self) -> None:
        time.sleep(self.step_s)
        while self.step == self.total - 1 and not Path(SETTINGS.get("FAKE_GATE", "/")).exists():
            time.sleep(0.05)
            if self.asked():
                raise Left
        self.step += 1
        loss = 0.3 + 0.7 * math.exp(-self.step / 20) + random.Random(self.step).uniform(-0.05, 0.05)
        self.emit(
            types.Stepped(
                self.step, self.total, self.step // 8, loss, 1e-4, 0.5 + loss, max(self.step_s, 1e-4), 1, 1.5
            )
        )
        print(f"step {self.step}/{self.total} loss {loss:.3f}", flush=True)
        if self.step == self.total // 2:
            self.break_down()
        if self.step % self.every == 0 or self.folder.take_control("save"):
            self.save()
        if self.step % self.draw_every == 0 or self.folder.take_control("validate"):
            self.draw("trained")
            self.emit(types.Evaluated(self.step, "held out", "eval", loss + 0.1, loss - 1, 0.01, (), True))
        if self.asked():
            self.save()
            raise Left

    def break_down(self) -> None:
        if SETTINGS.get("FAKE_OOM") == "host":
            os.kill(os.getpid(), signal.SIGKILL)
        if SETTINGS.get("FAKE_OOM") == "cuda":
            print(f"Traceback (most recent call last):\n  ...\n{CUDA}", file=sys.stderr, flush=True)
            os._exit(1)
        if SETTINGS.get("FAKE_FAIL"):
            code = int(SETTINGS["FAKE_FAIL"])
            self.emit(types.Failed(self.step, "failed on request", code))
            self.folder.write_exit(code, "failed", self.step, "failed on request")
            sys.exit(code)

    def save(self) -> None:
        name = f"checkpoint-{self.step}"
        replace_folder(self.folder.path / name, partial(write_checkpoint, step=self.step, config=self.config))
        self.emit(types.Saved(self.step, str(self.folder.path / name), 0.01, 10))

    def draw(self, which: str) -> None:
        from PIL import Image, ImageDraw

        self.emit(types.StageStarted("draw", len(self.prompts), "pictures"))
        for at, prompt in enumerate(self.prompts):
            image = Image.new("RGB", (128, 128), (40 + 60 * (at % 3), 80, min(255, 40 + self.step * 4)))
            ImageDraw.Draw(image).ellipse(
                (24, 24, 104, 104), fill=(min(255, self.step * 8), 180, 60 * (at % 4))
            )
            path = self.folder.path / "images" / f"step-{self.step:06d}" / f"fake-{at}-1-128x128.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            relative = path.relative_to(self.folder.path).as_posix()
            self.emit(types.ImageSaved(self.step, f"fake-{at}", prompt, relative, 42 + at, 128, 128, which))
        self.emit(types.StageDone("draw", len(self.prompts), 0.01))


def weights(step: int) -> bytes:
    """The smallest safetensors file: a header without tensors."""
    header = json.dumps({"__metadata__": {"step": str(step)}}).encode()
    return len(header).to_bytes(8, "little") + header


def write_checkpoint(folder: Path, step: int, config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(weights(step))
    (folder / "state.json").write_text(json.dumps({"step": step, "config": config}))
    (folder / "manifest.json").write_text(json.dumps({"files": {}}))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    config = json.loads(given.config.read_text(encoding="utf-8"))
    if given.rehearse:
        print(
            "  ok       pictures and captions\nrehearsal: nothing stands in the way of training", flush=True
        )
        return 0
    while not Path(SETTINGS.get("FAKE_LATE", "/")).exists():
        time.sleep(0.05)
    folder = RunFolder(Path(config["output_dir"]))
    fake = None
    with folder:
        if config.get("resume_from_checkpoint") == "never":
            folder.set_aside_earlier()
        folder.write_config(config)
        try:
            fake = Fake(folder, config)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, fake.handle)
            fake.train()
        except (Left, KeyboardInterrupt):
            step = fake.step if fake else 0
            folder.write_exit(75, "stopped", step, "stopped; the same command goes on")
            if fake:
                fake.emit(types.Finished(step, 0.1, "stopped"))
            return 75
        folder.write_exit(0, "done", fake.step)
    time.sleep(float(SETTINGS.get("FAKE_LINGER_S", "0")))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write a run folder like a training, with events, images, checkpoints and exit.json.

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

from simpletuner.events import event_types
from simpletuner.events.event_log import EventLog
from simpletuner.training.run_folder import RunFolder, replace_folder

ENVIRONMENT = {name: value for name, value in os.environ.items() if name.startswith("FAKE_")}
CUDA_OOM_MESSAGE = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "
    "GPU 0 has 11.00 GiB in total."
)


class StopRequested(Exception):
    """Stopped on request."""


class FakeTrainer:
    def __init__(self, folder: RunFolder, config: dict[str, Any]) -> None:
        self.folder, self.config, self.stop = folder, config, False
        self.total = int(ENVIRONMENT.get("FAKE_STEPS") or config.get("max_train_steps") or 20)
        self.step_s = float(ENVIRONMENT.get("FAKE_STEP_S", "0.02"))
        self.prompts = [
            f"fake prompt {at}" for at in range(int(ENVIRONMENT.get("FAKE_IMAGES", "2")))
        ]
        self.checkpoint_interval = int(
            config.get("checkpoint_step_interval") or max(1, self.total // 2)
        )
        self.validation_interval = int(
            config.get("validation_step_interval") or max(1, self.total // 2)
        )
        self.ignores_requests = "FAKE_DEAF" in ENVIRONMENT
        self.step = 0
        self.emit = EventLog(folder.events_path)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.ignores_requests:
            return
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def train(self) -> None:
        self.step = resumed = self.start_step()
        for name, unit in (
            ("scan", "pictures"),
            ("encode text", "captions"),
            ("encode images", "images"),
        ):
            self.run_stage(name, unit)
        run_dir = str(self.folder.path)
        self.emit(event_types.RunStarted("0.1.0", run_dir, "fake", "cpu", self.total, resumed))
        if resumed:
            self.emit(event_types.RunResumed(resumed, f"checkpoint-{resumed}"))
        else:
            self.save_images("base")
        self.emit(event_types.StageStarted("train", self.total, "steps"))
        started = time.monotonic()
        while self.step < self.total:
            self.run_step()
        self.save()
        (self.folder.path / "pytorch_lora_weights.safetensors").write_bytes(lora_bytes(self.step))
        self.emit(event_types.WeightsSaved(self.step, "pytorch_lora_weights.safetensors", 0.01, 10))
        self.emit(event_types.RunFinished(self.step, time.monotonic() - started, "done"))

    def start_step(self) -> int:
        wanted = self.config.get("resume_from_checkpoint", "latest")
        if wanted.startswith("checkpoint-"):
            return int(wanted.removeprefix("checkpoint-"))
        found = [
            int(path.name.rpartition("-")[2]) for path in self.folder.path.glob("checkpoint-*")
        ]
        return max(found, default=0)

    def run_stage(self, name: str, unit: str, count: int = 8) -> None:
        self.emit(event_types.StageStarted(name, count, unit))
        for done in range(1, count + 1):
            time.sleep(self.step_s / 8)
            self.emit(event_types.StageProgress(name, done, count, 100.0, 0.0))
            if self.stop_requested():
                raise StopRequested
        self.emit(event_types.StageCompleted(name, count, self.step_s))

    def stop_requested(self) -> bool:
        return not self.ignores_requests and (
            self.stop or self.folder.consume_control_request("stop")
        )

    def run_step(self) -> None:
        time.sleep(self.step_s)
        while self.step == self.total - 1 and not Path(ENVIRONMENT.get("FAKE_GATE", "/")).exists():
            time.sleep(0.05)
            if self.stop_requested():
                raise StopRequested
        self.step += 1
        loss = 0.3 + 0.7 * math.exp(-self.step / 20) + random.Random(self.step).uniform(-0.05, 0.05)
        self.emit(
            event_types.StepCompleted(
                self.step,
                self.total,
                self.step // 8,
                loss,
                1e-4,
                0.5 + loss,
                max(self.step_s, 1e-4),
                1,
                1.5,
            )
        )
        print(f"step {self.step}/{self.total} loss {loss:.3f}", flush=True)
        if self.step == self.total // 2:
            self.fail_if_configured()
        if self.step % self.checkpoint_interval == 0 or self.folder.consume_control_request("save"):
            self.save()
        if self.step % self.validation_interval == 0 or self.folder.consume_control_request(
            "validate"
        ):
            self.save_images("trained")
            self.emit(
                event_types.LossEvaluated(
                    self.step, "held out", "eval", loss + 0.1, loss - 1, 0.01, (), True
                )
            )
        if self.stop_requested():
            self.save()
            raise StopRequested

    def fail_if_configured(self) -> None:
        if ENVIRONMENT.get("FAKE_OOM") == "host":
            os.kill(os.getpid(), signal.SIGKILL)
        if ENVIRONMENT.get("FAKE_OOM") == "cuda":
            print(
                f"Traceback (most recent call last):\n  ...\n{CUDA_OOM_MESSAGE}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        if ENVIRONMENT.get("FAKE_FAIL"):
            code = int(ENVIRONMENT["FAKE_FAIL"])
            self.emit(event_types.RunFailed(self.step, "failed on request", code))
            self.folder.write_exit_status(code, "failed", self.step, "failed on request")
            sys.exit(code)

    def save(self) -> None:
        name = f"checkpoint-{self.step}"
        replace_folder(
            self.folder.path / name, partial(write_checkpoint, step=self.step, config=self.config)
        )
        self.emit(event_types.WeightsSaved(self.step, str(self.folder.path / name), 0.01, 10))

    def save_images(self, which: str) -> None:
        from PIL import Image, ImageDraw

        self.emit(event_types.StageStarted("draw", len(self.prompts), "pictures"))
        for at, prompt in enumerate(self.prompts):
            image = Image.new(
                "RGB", (128, 128), (40 + 60 * (at % 3), 80, min(255, 40 + self.step * 4))
            )
            ImageDraw.Draw(image).ellipse(
                (24, 24, 104, 104), fill=(min(255, self.step * 8), 180, 60 * (at % 4))
            )
            path = (
                self.folder.path / "images" / f"step-{self.step:06d}" / f"fake-{at}-1-128x128.png"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            relative = path.relative_to(self.folder.path).as_posix()
            self.emit(
                event_types.ImageSaved(
                    self.step, f"fake-{at}", prompt, relative, 42 + at, 128, 128, which
                )
            )
        self.emit(event_types.StageCompleted("draw", len(self.prompts), 0.01))


def lora_bytes(step: int) -> bytes:
    """The smallest safetensors file: a header without tensors."""
    header = json.dumps({"__metadata__": {"step": str(step)}}).encode()
    return len(header).to_bytes(8, "little") + header


def write_checkpoint(folder: Path, step: int, config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(lora_bytes(step))
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
            "  ok       pictures and captions\nrehearsal: nothing stands in the way of training",
            flush=True,
        )
        return 0
    while not Path(ENVIRONMENT.get("FAKE_LATE", "/")).exists():
        time.sleep(0.05)
    folder = RunFolder(Path(config["output_dir"]))
    fake = None
    with folder:
        if config.get("resume_from_checkpoint") == "never":
            folder.set_aside_earlier_results()
        folder.write_config(config)
        try:
            fake = FakeTrainer(folder, config)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, fake.handle_signal)
            fake.train()
        except (StopRequested, KeyboardInterrupt):
            step = fake.step if fake else 0
            folder.write_exit_status(75, "stopped", step, "stopped; the same command goes on")
            if fake:
                fake.emit(event_types.RunFinished(step, 0.1, "stopped"))
            return 75
        folder.write_exit_status(0, "done", fake.step)
    time.sleep(float(ENVIRONMENT.get("FAKE_LINGER_S", "0")))
    return 0


if __name__ == "__main__":
    sys.exit(main())

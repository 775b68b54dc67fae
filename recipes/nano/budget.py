"""How long a program of this recipe trains, and how it continues: steps or minutes, one file of
state.

Both the learning rate and the end depend on the progress only, the larger share of steps or of
minutes that is used up. The seconds of earlier calls count: a run of ten minutes that was stopped
after six has four left.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn


@dataclass
class Budget:
    """steps, minutes: None where it does not limit. seconds: spent before this call."""

    steps: int | None
    minutes: float | None
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise SystemExit("give --steps or --minutes")

    def elapsed(self) -> float:
        """Seconds of all calls."""
        return self.seconds + time.monotonic() - self.began

    def progress(self, step: int) -> float:
        """Share of the budget that is used before step `step`, in [0, 1]; 1 ends the run."""
        shares = [step / self.steps] if self.steps else []
        if self.minutes:
            shares.append(self.elapsed() / (60 * self.minutes))
        return min(1.0, max(shares))


def learning_rate(peak: float, progress: float, step: int, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine that ends at zero when the budget ends."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


def add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="optimizer steps, over all calls")
    parser.add_argument("--minutes", type=float, help="wall-clock minutes, over all calls")
    parser.add_argument("--save", type=int, default=300, help="steps between two states on disk")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches")


def device_named(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class StopSignal:
    """Within the context, SIGTERM and SIGINT are noted instead of ending the process at once.

    check() is called between two steps: it saves the state and exits with a message.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        self.save, self.received = save, False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def check(self) -> None:
        if self.received:
            self.save()
            raise SystemExit("stopped; the state is saved and the same command resumes")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Average:
    """Moving average in float32: shadow <- shadow + (1 - d) (weights - shadow).

    d = min(decay, (1 + n) / (10 + n)) at update n, so that a short run is not mostly its start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.params = list(model.parameters())
        self.shadow = [param.detach().float().clone() for param in self.params]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(
            self.shadow, [param.detach().float() for param in self.params], 1 - decay
        )

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for param, shadow in zip(model.parameters(), self.shadow, strict=True):
            param.copy_(shadow)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for shadow, saved in zip(self.shadow, state["shadow"], strict=True):
            shadow.copy_(saved)


class RunState:
    """DIR/state.pt, written completely or not at all, and DIR/log.jsonl."""

    def __init__(self, folder: Path, **parts: Any) -> None:
        """parts: what has state_dict and load_state_dict, by name."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.log, self.parts = folder / "state.pt", folder / "log.jsonl", parts

    def load(self, budget: Budget, device: torch.device) -> int:
        """Return the next step; 0 where nothing was saved."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True, map_location=device)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        budget.seconds = state["seconds"]
        return int(state["step"])

    def save(self, step: int, budget: Budget) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        partial = self.file.with_suffix(".partial")
        torch.save({**state, "step": step, "seconds": budget.elapsed()}, partial)
        partial.replace(self.file)

    def log_row(self, row: dict[str, float]) -> None:
        with self.log.open("a", encoding="utf-8") as log:
            print(json.dumps(row), file=log)

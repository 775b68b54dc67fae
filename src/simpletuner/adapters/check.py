"""Which program does what with a LoRA file: applied, ignored, wrong strength, refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simpletuner.adapters import layouts, names
from simpletuner.adapters.layouts import LAYOUTS, LoraFile
from simpletuner.adapters.loaders import PROGRAMS, Program, reading

Outcome = Literal["applied", "in part", "ignored", "wrong strength", "refused"]


@dataclass(frozen=True)
class Verdict:
    """modules: adapted as the file means it, of `of`. strength: 1 is right; None: there is no one value."""

    program: str
    outcome: Outcome
    modules: int
    of: int
    strength: float | None
    why: str


def check(path: Path) -> tuple[LoraFile, tuple[Verdict, ...]]:
    """A verdict for each program. ModelError for a file that is no LoRA of Chroma in any layout."""
    file = layouts.read(path)
    return file, tuple(verdict(program, file) for program in PROGRAMS.values())


def verdict(program: Program, file: LoraFile) -> Verdict:
    whole = file.factors()
    found = reading(program, file)
    native = LAYOUTS[file.layout].native
    stored = {module: (names.native_name(module) or ("", 0))[0] if native else module for module in whole}
    reached = [module for module, name in stored.items() if name in found.strengths]
    lost = (
        any(whole[module].magnitude is not None for module in reached)
        and file.layout not in program.magnitude
    )
    factors = {_ratio(found.strengths[stored[module]], file.scale(stored[module])) for module in reached}
    right = [] if lost else [
        module for module in reached
        if math.isclose(found.strengths[stored[module]], file.scale(stored[module]), rel_tol=1e-6)
    ]  # fmt: skip
    strength = factors.pop() if len(factors) == 1 and not lost else None
    if found.refusal:
        return Verdict(program.title, "refused", 0, len(whole), None, found.refusal)
    if not reached:
        return Verdict(program.title, "ignored", 0, len(whole), None, found.why)
    if lost:
        why = "the magnitudes of this DoRA are left out or scaled by another rule"
        return Verdict(program.title, "wrong strength", 0, len(whole), None, why)
    if len(right) < len(reached):
        return Verdict(program.title, "wrong strength", len(right), len(whole), strength, found.why)
    if len(reached) < len(whole):
        passed = next(module for module in whole if module not in reached)
        return Verdict(
            program.title,
            "in part",
            len(right),
            len(whole),
            strength,
            f"{passed} is passed over, as others may be",
        )
    return Verdict(program.title, "applied", len(right), len(whole), 1.0, "")


def _ratio(found: float, meant: float) -> float | None:
    return round(found / meant, 6) if meant else None

"""Which program does what with a LoRA file: applied, ignored, wrong strength, refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simpletuner.adapters import layouts, module_names
from simpletuner.adapters.compatibility import (
    CONSUMER_PROGRAMS,
    ConsumerProgram,
    PredictedLoad,
    loses_magnitude,
    predict_load,
)
from simpletuner.adapters.layouts import LAYOUTS, LoraFile

Outcome = Literal["applied", "in part", "ignored", "wrong strength", "refused"]


@dataclass(frozen=True)
class ProgramCompatibility:
    """modules: adapted as the file means it, of `of`. strength: 1 is right; None: there is no one value."""

    program: str
    outcome: Outcome
    modules: int
    of: int
    strength: float | None
    why: str


def check_compatibility(path: Path) -> tuple[LoraFile, tuple[ProgramCompatibility, ...]]:
    """A verdict for each program. ModelError for a file that is no LoRA of Chroma in any layout."""
    file = layouts.read_lora_file(path)
    return file, tuple(assess_program(program, file) for program in CONSUMER_PROGRAMS.values())


def assess_program(program: ConsumerProgram, file: LoraFile) -> ProgramCompatibility:
    whole, found = file.to_deltas(), predict_load(program, file)
    native = LAYOUTS[file.layout].uses_native_names
    stored = {
        module: (module_names.locate_in_native(module) or ("", 0))[0] if native else module
        for module in whole
    }
    ratios = {
        module: _strength_ratio(
            found.strengths[name], file.module_scale(name), loses_magnitude(program, file, name)
        )
        for module, name in stored.items()
        if name in found.strengths
    }
    right = sum(ratio == 1.0 for ratio in ratios.values())
    one = next(iter(ratios.values()), None) if len(set(ratios.values())) == 1 else None
    outcome, why = _classify(found, right, len(ratios), len(whole))
    if not why and outcome == "in part":
        why = f"{next(module for module in whole if module not in ratios)} is passed over, as others may be"
    if outcome == "wrong strength" and None in ratios.values():
        why = "the magnitudes of this DoRA are left out, or scaled by another rule"
    return ProgramCompatibility(
        program.title, outcome, right, len(whole), one, "" if outcome == "applied" else why
    )


def _classify(found: PredictedLoad, right: int, reached: int, whole: int) -> tuple[Outcome, str]:
    if found.refusal:
        return "refused", found.refusal
    if not reached:
        return "ignored", found.reason
    if right < reached:
        return "wrong strength", found.reason
    return ("applied", "") if reached == whole else ("in part", "")


def _strength_ratio(found: float, meant: float, lost: bool) -> float | None:
    """Of the strength in the program to the one meant; None where there is none."""
    if lost:
        return None
    return (
        1.0
        if math.isclose(found, meant, rel_tol=1e-6)
        else round(found / meant, 6)
        if meant
        else None
    )

"""Check what each consumer program does with a LoRA file: apply, ignore or refuse it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simpletuner.adapters.compatibility import (
    ConsumerProgram,
    LoraConventions,
    PredictedLoad,
    loses_magnitude,
    predict_load,
)
from simpletuner.adapters.lora_file import LoraFile, read_lora_file

Outcome = Literal["applied", "in part", "ignored", "wrong strength", "refused", "unknown"]


@dataclass(frozen=True)
class ProgramCompatibility:
    """Result for one program. version: the version of the program that it holds for.

    modules: number of modules applied as the file intends, out of `of`. strength: applied relative
    to intended strength, so 1 is correct; None if the modules differ. why: the reason unless
    everything is applied.
    """

    program: str
    outcome: Outcome
    modules: int
    of: int
    strength: float | None
    why: str
    version: str = ""


def check_compatibility(
    path: Path, conventions: LoraConventions
) -> tuple[LoraFile, tuple[ProgramCompatibility, ...]]:
    """Read a file and return it with the result for each program.

    Raises ModelError for a file that is not a LoRA of a known layout.
    """
    file = read_lora_file(path, conventions.names)
    programs = conventions.programs.values()
    return file, tuple(assess_program(program, file) for program in programs)


def assess_program(program: ConsumerProgram, file: LoraFile) -> ProgramCompatibility:
    """Return how `program` treats `file`."""
    deltas = file.to_deltas()
    predicted = predict_load(program, file)
    stored = {
        module: (file.names.locate_in_native(module) or ("", 0))[0]
        if file.uses_native_names
        else module
        for module in deltas
    }
    ratios = {
        module: _strength_ratio(
            predicted.strengths[name], file.module_scale(name), loses_magnitude(program, file, name)
        )
        for module, name in stored.items()
        if name in predicted.strengths
    }
    correct = sum(ratio == 1.0 for ratio in ratios.values())
    strength = next(iter(ratios.values()), None) if len(set(ratios.values())) == 1 else None
    outcome, why = _classify(predicted, correct, len(ratios), len(deltas))
    if not why and outcome == "in part":
        skipped = next(module for module in deltas if module not in ratios)
        why = f"{skipped} is skipped, and possibly others"
    if outcome == "wrong strength" and None in ratios.values():
        why = "the magnitudes of this DoRA are ignored, or normalized in another way"
    return ProgramCompatibility(
        program.title,
        outcome,
        correct,
        len(deltas),
        strength,
        "" if outcome == "applied" else why,
        program.version,
    )


def _classify(
    predicted: PredictedLoad, correct: int, reached: int, total: int
) -> tuple[Outcome, str]:
    if predicted.refusal:
        return "refused", predicted.refusal
    if not reached:
        return "ignored", predicted.reason
    if correct < reached:
        return "wrong strength", predicted.reason
    return ("applied", "") if reached == total else ("in part", "")


def _strength_ratio(applied: float, intended: float, magnitude_lost: bool) -> float | None:
    """Return the ratio of applied to intended strength, or None if the delta differs otherwise."""
    if magnitude_lost:
        return None
    return (
        1.0
        if math.isclose(applied, intended, rel_tol=1e-6)
        else round(applied / intended, 6)
        if intended
        else None
    )

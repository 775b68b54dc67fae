"""Prediction, from the keys of a file alone, of how programs load a LoRA that is not read here.

Files with text encoder weights, keys of Flux that Chroma lacks, convolution shapes, stray or orphan
tensors, full deltas or OFT are no layout of layouts.py. Programs load them all the same: they look
up the keys that they know, module by module, and ignore, tolerate or refuse the others.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from simpletuner.adapters.compatibility import ConsumerProgram, KeyLookup, LoraConventions
from simpletuner.adapters.compatibility_check import Outcome, ProgramCompatibility
from simpletuner.adapters.key_forms import ATTACHED, OTHER_FORMS, PAIR_FORMS
from simpletuner.adapters.module_names import ModuleNames
from simpletuner.adapters.safetensors_reader import find_weights_file, read_keys_and_metadata
from simpletuner.errors import ModelError

TEXT_ENCODER_PATTERN = re.compile(r"(?:lora_te|text_encoder|t5[._]|lora_prior_te)")


@dataclass(frozen=True)
class KeySurvey:
    """Keys of a file by module. forms: module key -> form -> endings that are present."""

    path: Path
    forms: Mapping[str, Mapping[str, frozenset[str]]]
    attached: Mapping[str, frozenset[str]]
    stray: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    keys: int

    def __str__(self) -> str:
        counts = Counter(form for forms in self.forms.values() for form in forms)
        kinds = ", ".join(f"{count} x {form}" for form, count in counts.most_common())
        parts = [f"{len(self.forms)} modules ({kinds or 'no delta'})"]
        texts = sum(bool(TEXT_ENCODER_PATTERN.match(module)) for module in self.forms)
        if texts:
            parts.append(f"{texts} of them of text encoders")
        if self.stray:
            parts.append(f"{len(self.stray)} other keys such as {self.stray[0]!r}")
        return f"{self.keys} keys: {'; '.join(parts)}"


def survey_keys(path: Path) -> KeySurvey:
    """Read the keys and shapes of a file. Raises ModelError for a file that is not safetensors."""
    path = find_weights_file(path)
    keys, _ = read_keys_and_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    forms: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    attached: dict[str, set[str]] = defaultdict(set)
    stray = []
    endings = {
        ending: form
        for form, suffixes in {**PAIR_FORMS, **OTHER_FORMS}.items()
        for ending in suffixes
    }
    by_length = sorted([*endings, *ATTACHED], key=len, reverse=True)
    for key in keys:
        ending = next((ending for ending in by_length if key.endswith(ending)), None)
        if ending is None:
            stray.append(key)
        elif ending in ATTACHED:
            attached[key.removesuffix(ending)].add(ending)
        else:
            forms[key.removesuffix(ending)][endings[ending]].add(ending)
    return KeySurvey(
        path,
        {
            module: {form: frozenset(present) for form, present in by_form.items()}
            for module, by_form in forms.items()
        },
        {module: frozenset(present) for module, present in attached.items()},
        tuple(stray),
        shapes,
        len(keys),
    )


def predict_from_keys(
    survey: KeySurvey, conventions: LoraConventions
) -> tuple[ProgramCompatibility, ...]:
    """Return how each program loads the file; the modules are counted, values are not compared."""
    if not survey.forms:
        raise ModelError(f"{survey.path} holds no LoRA weights: {survey}")
    return tuple(
        _assess(program, survey, conventions.names) for program in conventions.programs.values()
    )


def _assess(
    program: ConsumerProgram, survey: KeySurvey, names: ModuleNames
) -> ProgramCompatibility:
    def result(outcome: Outcome, modules: int, why: str) -> ProgramCompatibility:
        strength = 1.0 if outcome in ("applied", "in part") else None
        return ProgramCompatibility(
            program.title, outcome, modules, total, strength, why, program.version
        )

    total = len(survey.forms)
    lookup = program.key_lookup
    if lookup is None:
        return result("unknown", 0, "its loader was not examined for files with such keys")
    applied = [
        module
        for module, forms in survey.forms.items()
        if lookup.finds(module, names) and forms.keys() & set(lookup.forms)
    ]
    for module in applied:
        if reason := _failure(lookup, module, survey):
            return result("refused", 0, f"{reason}; nothing of the file is loaded")
    complete = [module for module in applied if _is_complete(module, survey, lookup)]
    unmatched = _count_unmatched(survey, set(complete), lookup)
    if lookup.tolerated_keys is not None and unmatched > lookup.tolerated_keys:
        return result(
            "refused",
            0,
            f"{unmatched} keys match nothing, and it tolerates {lookup.tolerated_keys}",
        )
    if not complete:
        return result("ignored", 0, "no key matches a module")
    lost = _magnitude_remark(survey, complete, lookup)
    if lost:
        return result("wrong strength", 0, lost)
    if unmatched or len(complete) < total:
        missing = next((module for module in survey.forms if module not in complete), "")
        example = f", such as those of {missing}" if missing else ""
        why = f"{unmatched} {'key is' if unmatched == 1 else 'keys are'} not loaded{example}"
        why += f"; {lookup.unmatched_note}" if lookup.unmatched_note else ""
        return result("in part", len(complete), why)
    return result("applied", len(complete), "")


def _failure(lookup: KeyLookup, module: str, survey: KeySurvey) -> str:
    """Return the exception that the program ends with at this module; "" for none."""
    for form, (down, up) in PAIR_FORMS.items():
        present = survey.forms[module].get(form, frozenset())
        needed, other = (down, up) if lookup.fails_without == "A" else (up, down)
        if form in lookup.forms and other in present and needed not in present:
            return f"KeyError: {module} has no {needed[1:]}"
    if not _is_complete(module, survey, lookup):
        return ""
    if lookup.needs_alpha and ".alpha" not in survey.attached.get(module, ()):
        return f"KeyError: {module} has no alpha"
    if lookup.only_matrices:
        for key, shape in survey.shapes.items():
            if key.startswith(f"{module}.") and len(shape) > 2:
                return f"RuntimeError: {key} has the shape of a convolution, {shape}"
    return ""


def _is_complete(module: str, survey: KeySurvey, lookup: KeyLookup) -> bool:
    return any(
        form in lookup.forms
        and (form not in PAIR_FORMS or set(PAIR_FORMS[form]) <= survey.forms[module][form])
        for form in survey.forms[module]
    )


def _count_unmatched(survey: KeySurvey, applied: set[str], lookup: KeyLookup) -> int:
    count = len(survey.stray)
    for module, forms in survey.forms.items():
        for form, endings in forms.items():
            count += 0 if module in applied and form in lookup.forms else len(endings)
    for module, endings in survey.attached.items():
        known = lookup.attached if module in applied else frozenset()
        count += len(endings - known)
    return count


def _magnitude_remark(survey: KeySurvey, modules: list[str], lookup: KeyLookup) -> str:
    """Say that magnitudes are lost; ComfyUI and Forge apply one kind, those per input."""
    for module in modules:
        attached = survey.attached.get(module, frozenset())
        if attached & {".lora_magnitude_vector", ".lora_magnitude_vector.weight"}:
            return "the magnitudes of this DoRA are ignored"
        shape = survey.shapes.get(f"{module}.dora_scale")
        if shape is None:
            continue
        if ".dora_scale" not in lookup.attached:
            return "the magnitudes of this DoRA are ignored"
        if not (len(shape) == 2 and shape[0] == 1) or not lookup.applies_input_magnitudes:
            return "the magnitudes of this DoRA are normalized in another way"
    return ""

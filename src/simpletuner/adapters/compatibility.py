"""Rules by which the programs that people sample with load a LoRA file.

The rules are data. Which programs there are, and what each does with the LoRA files of an
architecture, is in the model family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from simpletuner.adapters.deltas import Delta
from simpletuner.adapters.lora_file import LoraFile
from simpletuner.adapters.module_names import ModuleNames

RefusalCheck = Callable[[LoraFile], "str | None"]


@dataclass(frozen=True)
class LoadRule:
    """A program's treatment of files of one layout. reason: set unless the file is simply applied.

    strength: "alpha" is alpha / rank by the file's alpha tensors, or 1 without them; "header" asks
    PEFT's configuration first if there are no alpha tensors; "one" is always 1.
    """

    outcome: Literal["applied", "ignored", "refused"] = "applied"
    strength: Literal["alpha", "header", "one"] = "alpha"
    reason: str = ""


@dataclass(frozen=True)
class PredictedLoad:
    """Stored module -> factor that its delta is multiplied by; skipped modules are absent."""

    strengths: Mapping[str, float]
    refusal: str = ""
    reason: str = ""


@dataclass(frozen=True)
class KeyLookup:
    """A program's lookup of keys, module by module.

    native_prefixes, diffusers_prefixes: what precedes a native name, or one of diffusers; one that
    ends with "_" is followed by underscores. forms: of key_forms.py that it knows. attached:
    endings that it takes with a delta. tolerated_keys: it refuses a file with more unmatched keys;
    None without a limit. fails_without: the loading ends with an exception at a pair that lacks
    this factor; it overlooks a pair that lacks the other one. needs_alpha: so it does at a module
    without alpha. only_matrices: and at shapes of convolutions. applies_input_magnitudes: a
    dora_scale per input is applied as it was trained. other_native_modules: native modules that no
    LoRA here adapts, by their start. aliases: ending of a native module -> that of the module whose
    first rows it names. unmatched_note: what else happens to a file of which some keys match
    nothing.
    """

    native_prefixes: tuple[str, ...]
    diffusers_prefixes: tuple[str, ...]
    forms: tuple[str, ...]
    attached: frozenset[str]
    tolerated_keys: int | None = None
    fails_without: Literal["A", "B"] = "A"
    needs_alpha: bool = False
    only_matrices: bool = False
    applies_input_magnitudes: bool = False
    other_native_modules: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    unmatched_note: str = ""

    def finds(self, module: str, names: ModuleNames) -> bool:
        """Return whether the key of a module, without its ending, names a weight."""
        for alias, ending in self.aliases:
            if module.endswith(alias):
                module = module.removesuffix(alias) + ending
        for prefix in self.native_prefixes:
            written = module.removeprefix(prefix)
            if module.startswith(prefix):
                if any(written.startswith(other) for other in self.other_native_modules):
                    return True
                dotted = (
                    names.underscores_to_dots(written, True) if prefix.endswith("_") else written
                )
                if dotted is not None and names.diffusers_names(dotted):
                    return True
        for prefix in self.diffusers_prefixes:
            written = module.removeprefix(prefix)
            if module.startswith(prefix):
                dotted = (
                    names.underscores_to_dots(written, False) if prefix.endswith("_") else written
                )
                if dotted is not None and names.locate_in_native(dotted):
                    return True
        return False


@dataclass(frozen=True)
class ConsumerProgram:
    """A program that loads LoRA files.

    version: which one the rules hold for. source: revision and functions that they were read in.
    rules: by layout. refusal_checks: each returns why a file is refused as a whole, or None.
    skips_module: takes whether the layout has native names, and the module. magnitude_layouts:
    layouts whose lora_magnitude_vector is applied. predict_lycoris_load: for LoHa and LoKr, if they
    are treated differently from LoRA. key_lookup: for files of other keys than these layouts; None
    if that was not examined.
    """

    title: str
    version: str
    source: str
    rules: Mapping[str, LoadRule]
    refusal_checks: tuple[RefusalCheck, ...] = ()
    skips_module: Callable[[bool, str], bool] = lambda native, module: False
    magnitude_layouts: tuple[str, ...] = ()
    predict_lycoris_load: Callable[[LoraFile], PredictedLoad] | None = None
    key_lookup: KeyLookup | None = None


@dataclass(frozen=True)
class LoraConventions:
    """LoRA files of one architecture: module names and the programs that load them.

    verified_programs: layout that can be written -> programs that must apply it as trained.
    lycoris_programs: those that apply LoHa and LoKr at all. width: of the published models, the
    only one that other programs support; None if they support any.
    """

    names: ModuleNames
    programs: Mapping[str, ConsumerProgram]
    verified_programs: Mapping[str, tuple[str, ...]]
    lycoris_programs: tuple[str, ...] = ()
    width: int | None = None


def predict_load(program: ConsumerProgram, file: LoraFile) -> PredictedLoad:
    """Return how strongly a program applies each module of a file, or why it does not."""
    rule = program.rules[file.layout]
    if file.is_lycoris and program.predict_lycoris_load is not None:
        return program.predict_lycoris_load(file)
    refusals = (check(file) for check in program.refusal_checks)
    if rule.outcome == "refused":
        refusal = rule.reason
    else:
        refusal = next((reason for reason in refusals if reason), "")
    if refusal or rule.outcome != "applied":
        return PredictedLoad({}, refusal, rule.reason)
    applied_modules = (
        name for name in file.modules if not program.skips_module(file.uses_native_names, name)
    )
    strengths = {name: _module_strength(rule, file, name) for name in applied_modules}
    return PredictedLoad(strengths, reason=rule.reason)


def applied_deltas(program: ConsumerProgram, file: LoraFile) -> dict[str, Delta]:
    """Return the deltas that a program adds, by diffusers' module; empty for a refused file."""
    deltas: dict[str, Delta] = {}
    for name, strength in predict_load(program, file).strengths.items():
        magnitude = None
        if file.layout in program.magnitude_layouts:
            magnitude = file.modules[name].magnitude
        if _applies_dora_scale(program, file, name):
            magnitude = file.modules[name].dora_scale
        deltas |= file.split_module(name, strength, magnitude)
    return deltas


def loses_magnitude(program: ConsumerProgram, file: LoraFile, name: str) -> bool:
    """Return whether a program ignores or misreads the magnitude of a DoRA module.

    ComfyUI and Forge divide a dora_scale per output by other norms than LyCORIS and PEFT train
    with; for one per input they take the norms that it was trained with.
    """
    module = file.modules[name]
    ignored = module.magnitude is not None and file.layout not in program.magnitude_layouts
    misread = module.dora_scale is not None and not _applies_dora_scale(program, file, name)
    return ignored or misread


def _applies_dora_scale(program: ConsumerProgram, file: LoraFile, name: str) -> bool:
    dora_scale, lookup = file.modules[name].dora_scale, program.key_lookup
    per_input = dora_scale is not None and dora_scale.ndim == 2
    return per_input and lookup is not None and lookup.applies_input_magnitudes


def _module_strength(rule: LoadRule, file: LoraFile, name: str) -> float:
    own = file.modules[name].scale
    if rule.strength == "header" and own is None:
        header = file.peft_config_scale(name)
        if header is not None:
            return header
    return 1.0 if rule.strength == "one" or own is None else own

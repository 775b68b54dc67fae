"""Every check in the order in which it runs: those that teach most in the least time come first.

Standard library only. Expected durations are for an H200; none was measured there yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.checks import Check

SCHEMES = ("int8", "fp8", "int4", "nf4")
NANO_PACKAGES = ("diffusers", "transformers")
PEFT_PACKAGES = ("diffusers", "peft")
PLAN_S = 40

# Options of the runs that must be equal.
FULL_RANK = {"full_rank": True, "grad_clip_method": "value", "optimizer": "adamw_bf16"}
RELEASED = {"optimizer_release_gradients": True}
STATES_ON_HOST = {"optimizer_cpu_offload_method": "states"}
INPUTS_ON_HOST = {"gradient_checkpointing_backend": "offload"}
ALL_SWAPPED = {"swapped": 1.0}
NOT_CHECKPOINTED = {"checkpointing": False}


def environment_checks() -> Iterator[Check]:
    yield Check("versions", "environment", "machine.list_versions", 3)
    yield Check("rates", "environment", "machine.measure_rates", 5)
    yield Check("attention backend", "environment", "attention.list_backends", 8)


def equal(name: str, plain: dict[str, Any], other: dict[str, Any], expected_s: float = 5) -> Check:
    """A run with the options of both must equal a run with the options `plain`."""
    arguments = {"plain": plain, "other": {**plain, **other}}
    return Check(f"equal: {name}", "correctness", "equal_runs.compare_runs", expected_s, arguments)


def correctness_checks() -> Iterator[Check]:
    def check(name: str, target: str, expected_s: float) -> Check:
        return Check(name, "correctness", target, expected_s)

    yield check("CPU and GPU", "numerics.compare_cpu_and_gpu", 25)
    yield check("quantised bits", "numerics.compare_quantised_bits", 15)
    yield check("equal: the same run again", "equal_runs.compare_repeated_run", 8)
    yield equal("not checkpointed", {}, NOT_CHECKPOINTED)
    yield equal("all blocks swapped", {}, ALL_SWAPPED)
    yield equal("half of the blocks swapped", {}, {"swapped": 0.5})
    yield equal("inputs on the host", {}, INPUTS_ON_HOST)
    yield equal("swapped, inputs on the host", {}, {**ALL_SWAPPED, **INPUTS_ON_HOST})
    swapped = {**ALL_SWAPPED, **INPUTS_ON_HOST}
    yield equal("nf4, swapped, inputs on the host", {"precision": "nf4"}, swapped, 8)
    yield equal("dropout, not checkpointed", {"lora_dropout": 0.1}, NOT_CHECKPOINTED, 8)
    yield equal("states on the host, adamw", {"optimizer": "adamw"}, STATES_ON_HOST)
    yield equal("states on the host, adamw_8bit", {"optimizer": "adamw_8bit"}, STATES_ON_HOST, 8)
    yield equal("full rank, gradients released", FULL_RANK, RELEASED, 15)
    yield equal("full rank, states on the host", {**FULL_RANK, **RELEASED}, STATES_ON_HOST, 15)
    yield check("unequal batch", "numerics.compare_unequal_batch", 8)
    yield check("stochastic rounding", "numerics.check_stochastic_rounding", 1)
    target = "nano_runs.compare_vae_and_sampler"
    yield Check("nano: VAE and sampler", "correctness", target, 15, {}, NANO_PACKAGES)
    yield resumed_run("nano: resumed, deterministic", "correctness", exact=True)
    yield check("compiled and eager", "equal_runs.compare_compiled", 60)


def resumed_run(name: str, group: str, exact: bool) -> Check:
    target = "nano_runs.compare_resumed_run"
    arguments = {"exact": exact}
    return Check(name, group, target, 30, arguments, NANO_PACKAGES, skip_in_rehearsal=not exact)


def text_length_checks() -> Iterator[Check]:
    group = "text lengths"
    for setting, expected_s in (("default", 40), ("flash", 15), ("no_recompile", 50)):
        target = "attention.measure_text_lengths"
        yield Check(f"{group}, {setting}", group, target, expected_s, {"setting": setting})


def step(
    px: int,
    expected_s: float,
    note: str = "",
    *,
    group: str = "step",
    skip_in_rehearsal: bool = True,
    **fields: Any,
) -> Check:
    """One step of ours at full size. note: a name for what the other words do not say."""
    precision = fields.get("precision", "no_change")
    weights = "bf16" if precision == "no_change" else precision
    words = [
        "full rank" if fields.get("full_rank") else weights,
        f"{px} px",
        "checkpointed" if fields.get("checkpointing", True) else "not checkpointed",
        "compiled" if fields.get("compiled") else "",
        note,
    ]
    return Check(
        " ".join(filter(None, words)),
        group,
        "simpletuner_step.measure",
        expected_s,
        {"px": px, **fields},
        skip_in_rehearsal=skip_in_rehearsal,
    )


def full_size_checks() -> Iterator[Check]:
    on_host = {"swapped": 1.0, "on_host": True}
    yield step(1024, 10, skip_in_rehearsal=False)
    yield step(512, 10)
    yield step(1024, 10, checkpointing=False)
    yield step(512, 10, checkpointing=False, skip_in_rehearsal=False)
    yield step(1024, 15, precision="nf4")
    yield step(1024, 12, precision="int8")
    note = "all swapped, on host"
    yield step(1024, 25, note, precision="nf4", **on_host, skip_in_rehearsal=False)
    yield step(1024, 25, full_rank=True, skip_in_rehearsal=False)


def diffusers_step(
    px: int,
    text: str,
    checkpointing: bool,
    *,
    compiled: bool = False,
    group: str = "diffusers",
    skip_in_rehearsal: bool = True,
) -> Check:
    """One step of diffusers and PEFT at full size. text: "padded" or "trimmed"."""
    words = [
        f"diffusers {px} px",
        "checkpointed" if checkpointing else "not checkpointed",
        text,
        "compiled" if compiled else "",
    ]
    return Check(
        " ".join(filter(None, words)),
        group,
        "diffusers_step.measure",
        70 if compiled else 15,
        {
            "px": px,
            "trimmed": text == "trimmed",
            "checkpointing": checkpointing,
            "compiled": compiled,
        },
        PEFT_PACKAGES,
        skip_in_rehearsal=skip_in_rehearsal,
    )


def diffusers_checks() -> Iterator[Check]:
    yield diffusers_step(512, "padded", False, skip_in_rehearsal=False)
    yield diffusers_step(512, "trimmed", False)
    yield diffusers_step(1024, "padded", True)
    yield diffusers_step(1024, "trimmed", True, skip_in_rehearsal=False)


def compile_checks() -> Iterator[Check]:
    # A rehearsal compiles blocks in "compiled and eager"; tracing them takes seconds.
    yield step(1024, 60, group="compile", compiled=True)
    yield step(1024, 60, group="compile", precision="nf4", compiled=True)


def micro_checks() -> Iterator[Check]:
    module = "single_operations"
    yield Check("scaled product", "micro", f"{module}.measure_fp8_product", 3)
    for optimizer in ("adamw", "adamw_8bit", "adamw_bf16"):
        yield Check(
            f"optimizer step, {optimizer}",
            "micro",
            f"{module}.measure_optimizer_step",
            8,
            {"optimizer": optimizer},
            skip_in_rehearsal=optimizer != "adamw_8bit",
        )
    for scheme in SCHEMES:
        yield Check(
            f"dequantise {scheme}",
            "micro",
            f"{module}.measure_dequantisation",
            8,
            {"scheme": scheme},
            skip_in_rehearsal=scheme != "nf4",
        )


def further_checks() -> Iterator[Check]:
    """Checks for the time that remains, and for later runs with the same results file."""
    group = "further"
    on_host = {"precision": "nf4", "on_host": True}
    all_on_host = {**on_host, **ALL_SWAPPED}
    module = "image_generation"
    size = {"px": 1024}
    yield resumed_run("nano: resumed, usual algorithms", group, exact=False)
    yield Check("sampler, 1024 px", group, f"{module}.measure_sampler", 12, size)
    vae = {**size, "batch": 4}
    yield Check("VAE, 1024 px", group, f"{module}.measure_vae", 12, vae, ("diffusers",))
    yield step(512, 12, "batch 4", group=group, batch=4, skip_in_rehearsal=False)
    yield step(512, 12, "adamw_8bit", group=group, options={"optimizer": "adamw_8bit"})
    yield step(512, 15, group=group, precision="nf4")
    yield step(512, 20, "all swapped, on host", group=group, **all_on_host)
    yield step(1024, 40, "half swapped", group=group, swapped=0.5)
    yield step(1024, 40, "all swapped", group=group, swapped=1.0)
    yield step(1024, 15, "on host", group=group, **on_host)
    yield step(1024, 40, "states on host", group=group, full_rank=True, options=STATES_ON_HOST)
    yield step(512, 25, group=group, full_rank=True)
    yield step(512, 60, group=group, compiled=True)
    yield diffusers_step(1024, "trimmed", False, group=group)
    yield diffusers_step(1024, "padded", False, group=group)
    yield diffusers_step(1024, "trimmed", True, compiled=True, group=group)
    precisions = ("no_change", "int8", "int4", "nf4")
    for px, precision, checkpointing in itertools.product(
        (512, 768, 1024), precisions, (True, False)
    ):
        yield step(px, 12, group=group, precision=precision, checkpointing=checkpointing)


def plan_checks(checks: Sequence[Check]) -> Iterator[Check]:
    """The memory plan's prediction for each measured step."""
    for check in checks:
        if check.target == "simpletuner_step.measure" and not check.arguments.get("compiled"):
            yield Check(
                plan_name(check.name),
                "plan",
                "simpletuner_step.predict",
                PLAN_S,
                check.arguments,
                background=True,
                skip_in_rehearsal=check.skip_in_rehearsal or check.group == "further",
            )


def plan_name(step_name: str) -> str:
    """Return the name of the check that predicts a step; compiled steps share the eager one's."""
    return f"plan of {step_name.replace(' compiled', '')}"


def catalog() -> list[Check]:
    """Return all checks in order. Names are unique: of equal names the first check counts."""
    checks = [
        *environment_checks(),
        *correctness_checks(),
        *text_length_checks(),
        *full_size_checks(),
        *diffusers_checks(),
        *compile_checks(),
        *micro_checks(),
        *further_checks(),
    ]
    by_name: dict[str, Check] = {}
    for check in checks:
        by_name.setdefault(check.name, check)
    unique = list(by_name.values())
    return [*unique, *plan_checks(unique)]

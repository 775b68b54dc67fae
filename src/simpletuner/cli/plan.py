"""simpletuner plan: an estimate of memory, disk and time, without weights or dataset."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import click

from simpletuner.config import flags
from simpletuner.config.load import load_config
from simpletuner.config.option_values import parse_memory_size
from simpletuner.config.schema import RunConfig
from simpletuner.errors import ConfigError

CONFIG_SOURCE_FLAGS = ("config", "env", "example")
COMMAND_FLAGS = ("json", "fit")


@click.command(
    "plan", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Estimate memory, disk and time of a training; with --fit, find settings that fit.

    Takes the flags of `train`: --config PATH, --env NAME, --example NAME and any option; --device
    cuda plans for a GPU that is not in this machine. --json prints one object. --fit 12GB, or --fit
    for the free memory, finds the fastest settings within it and changes nothing.
    """
    pairs = flags.parse_flags(list(words), ("json",))
    given = dict(pairs)
    options = [pair for pair in pairs if pair[0] not in (*CONFIG_SOURCE_FLAGS, *COMMAND_FLAGS)]
    loaded = load_config(
        options, given.get("config"), given.get("env"), given.get("example"), needs_data=False
    )
    report, lines = build_plan_report(loaded.config, "fit" in given, given.get("fit"))
    click.echo(json.dumps(report, indent=2) if "json" in given else "\n".join(lines))


def build_plan_report(
    run: RunConfig, fits: bool, limit: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the plan as one object and as lines of text."""
    from simpletuner.models import registry
    from simpletuner.training.device import select_device
    from simpletuner.training.memory_plan import fit, plan_formatting, step_time
    from simpletuner.training.memory_plan.communication import sent_bytes
    from simpletuner.training.memory_plan.machine_resources import detect_budget, reference_budget
    from simpletuner.training.memory_plan.measure_once import silent
    from simpletuner.training.memory_plan.prediction import predict_memory
    from simpletuner.training.memory_plan.preflight import smaller_training_message
    from simpletuner.training.memory_plan.world_layout import read_layout

    family = registry.get_family(run.model.model_family)
    limit_bytes = parse_memory_size(limit) if limit else None
    # Only the type of this device matters: what needs a GPU is planned for a reference GPU.
    anywhere = {
        "device": "auto",
        "musubi_blocks_to_swap": 0.0,
        "gradient_checkpointing_backend": "torch",
    }
    device = select_device(run.model.model_copy(update=anywhere))
    here, wanted = device.device.type, run.model.device
    waits = run.model.musubi_blocks_to_swap or run.model.gradient_checkpointing_backend == "offload"
    away = wanted not in ("auto", here) or (here == "cpu" and (limit or waits))
    room = (
        reference_budget("cuda" if wanted == "auto" else wanted) if away else detect_budget(device)
    )
    room = room.for_process(read_layout(run).local)
    progress = partial(click.echo, err=True) if fits else silent
    plan = predict_memory(run, family, kind=room.kind, progress=progress)
    lines = plan_formatting.format_plan(plan, room)
    report: dict[str, Any] = {
        **dataclasses.asdict(plan),
        "training": plan.training,
        "peak": plan.peak,
        "seconds": step_time.estimate_seconds(plan.flops, room.peak_flops, plan.moved),
        "seconds_on": room.name,
        "sent_bytes": sent_bytes(plan.communication),
    }
    if fits:
        size = room.available_for_tensors if limit_bytes is None else limit_bytes
        if size is None:
            raise ConfigError("the free memory of this device is not known; write --fit 12GB")
        search = fit.MemoryConfigSearch(run, family, (), room, progress=progress)
        ladder, best = fit.find_fitting_mode(search, size)
        lines += ["", f"planned for {room.name}", *plan_formatting.format_fit(run, best)]
        report["fit"] = dataclasses.asdict(best)
        if best.chosen is not None:
            report["options"] = best.chosen.options()
        else:
            lines.append(smaller_training_message(ladder, size))
    return report, lines

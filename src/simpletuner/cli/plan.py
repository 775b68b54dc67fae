"""simpletuner plan: what a training will need, without weights, network or dataset."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from simpletuner.config import flags
from simpletuner.config.load import load
from simpletuner.config.schema import RunConfig
from simpletuner.config.values import read_size
from simpletuner.errors import ConfigError

PLACES = ("config", "env", "example")
OWN = ("json", "fit")


@click.command("plan", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Predict memory, disk and time of a training; with --fit, what to change so that it fits.

    Takes what `train` takes: --config PATH, --env NAME, --example NAME and any option; --device cuda plans
    for a GPU that is elsewhere. --json prints one object. --fit 12GB, or --fit for what is free here, finds
    the fastest settings within it and changes nothing.
    """
    pairs = flags.pairs(list(words), ("json",))
    given = dict(pairs)
    options = [pair for pair in pairs if pair[0] not in (*PLACES, *OWN)]
    loaded = load(options, given.get("config"), given.get("env"), given.get("example"), needs_data=False)
    told, lines = planned(loaded.run, "fit" in given, given.get("fit"))
    click.echo(json.dumps(told, indent=2) if "json" in given else "\n".join(lines))


def planned(run: RunConfig, fits: bool, limit: str | None) -> tuple[dict[str, Any], list[str]]:
    """As one object, and as lines."""
    from simpletuner.models import registry
    from simpletuner.training.device import choose
    from simpletuner.training.plan import fit, speed, wording
    from simpletuner.training.plan.announce import smaller
    from simpletuner.training.plan.prediction import predict
    from simpletuner.training.plan.room import elsewhere, found

    family = registry.family(run.model.model_family)
    asked = read_size(limit) if limit else None
    # Of this machine only what it is: what needs a GPU is planned for one that is elsewhere.
    anywhere = {"device": "auto", "musubi_blocks_to_swap": 0.0, "gradient_checkpointing_backend": "torch"}
    device = choose(run.model.model_copy(update=anywhere))
    here, wanted = device.device.type, run.model.device
    waits = run.model.musubi_blocks_to_swap or run.model.gradient_checkpointing_backend == "offload"
    away = wanted not in ("auto", here) or (here == "cpu" and (limit or waits))
    room = elsewhere("cuda" if wanted == "auto" else wanted) if away else found(device)
    plan = predict(run, family, kind=room.kind)
    lines = wording.table(plan, room)
    told: dict[str, Any] = {
        **dataclasses.asdict(plan), "training": plan.training, "peak": plan.peak,
        "seconds": speed.seconds(plan.flops, room.peak, plan.moved), "seconds_on": room.name,
    }  # fmt: skip
    if fits:
        size = room.tensors if asked is None else asked
        if size is None:
            raise ConfigError("how much memory is free is not known here; write --fit 12GB")
        ladder = fit.Ladder(run, family, (), room)
        best = fit.fit(ladder, size)
        lines += ["", *wording.ways(run, best)]
        told["fit"] = dataclasses.asdict(best)
        if best.chosen is not None:
            told["options"] = best.chosen.options()
        else:
            lines.append(smaller(ladder, size))
    return told, lines

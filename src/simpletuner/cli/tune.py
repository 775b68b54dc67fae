"""simpletuner tune: find the learning rate by short trainings on the same samples and noise."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import click

from simpletuner.cli import rate_plan
from simpletuner.cli.checked_config import require_config_and_datasets, require_extras
from simpletuner.cli.rate_search import RateSearch, default_rates, make_plan
from simpletuner.config import flags
from simpletuner.config.load import try_load_config
from simpletuner.errors import ConfigError

CONFIG_SOURCE_FLAGS = ("config", "env", "example")
COMMAND_FLAGS = ("rates", "steps", "json", "dry_run")
SWITCHES = ("json", "dry_run", "help")


@click.command(
    "tune", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Find the learning rate of a training.

    Takes the flags of `train`: --config PATH, --env NAME, --example NAME and any option. --rates
    5e-5,1e-4,2e-4,4e-4 names the rates; without it five from a tenth to ten times learning_rate are
    tried. --steps N is the length of the longest trial. --dry-run prints the plan and its cost.
    --json prints the result as one object. Run the same command again to continue a search.
    """
    pairs = flags.parse_flags(list(words), SWITCHES)
    given = dict(pairs)
    options = [pair for pair in pairs if pair[0] not in (*CONFIG_SOURCE_FLAGS, *COMMAND_FLAGS)]
    tried = try_load_config(options, given.get("config"), given.get("env"), given.get("example"))
    loaded, backends = require_config_and_datasets(tried)
    require_extras(loaded)
    run = loaded.config
    rates = rate_plan.parse_rates(given["rates"] or "") if "rates" in given else default_rates(run)
    plan = make_plan(run, backends, rates, parse_steps(given.get("steps")))
    say = partial(click.echo, err="json" in given)
    if "dry_run" in given:
        say(plan.describe())
        if "json" in given:
            click.echo(json.dumps({**dataclasses.asdict(plan), "cost": plan.cost}, indent=2))
        return
    search = RateSearch(run, plan, say)
    chosen = search.run()
    if "json" in given:
        click.echo(json.dumps(search.record(chosen), indent=2))


def parse_steps(text: str | None) -> int | None:
    """Return the number of --steps. Raises ConfigError for anything but a number from 1."""
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--steps: {text!r} is not a number of steps, at least 1")
    return int(text)

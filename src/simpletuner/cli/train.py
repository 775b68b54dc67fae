"""simpletuner train: read and check everything first, import torch only when all is well."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import click

from simpletuner.config import flags
from simpletuner.config.catalog import catalog
from simpletuner.config.load import Attempt, Loaded, attempt, resolved
from simpletuner.config.rules import FP16
from simpletuner.config.values import read_size
from simpletuner.data.backends import read_backends
from simpletuner.data.dataset import Backends
from simpletuner.errors import ConfigError, Problem
from simpletuner.events import webhook
from simpletuner.validation.prompts import read_prompts

PLACES = {
    "config": "PATH  a configuration file, or its folder",
    "env": "NAME  the environment config/NAME",
    "example": "NAME  a packaged example (simpletuner examples list)",
}
FIT = {"fit [12GB]": "take the fastest settings that fit it, or what is free; say it again to go on"}
SWITCHES = {
    "show_config": "print every value and where it came from, and stop",
    "rehearse": "a few steps of your dataset and options on the tiny bundled model, on the CPU",
    "serve": "show the run's page on http://localhost:8001 while it trains",
    "help": "the basic options",
    "help_all": "all options",
}


@click.command(
    "train",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Train with the configuration in config.json, and with what the flags change of it."""
    pairs = flags.pairs(["--help" if word == "-h" else word for word in words], tuple(SWITCHES))
    given = dict(pairs)
    if "help" in given or "help_all" in given:
        click.echo(help_text(everything="help_all" in given))
        return
    empty = [Problem(f"--{name}", "needs a value") for name in PLACES if name in given and not given[name]]
    if empty:
        raise ConfigError(empty)
    if "fit" in given and not given.keys().isdisjoint(("rehearse", "show_config")):
        raise ConfigError("--fit is for the training itself; simpletuner plan --fit shows what it would take")
    within = (given["fit"] or "") if "fit" in given else None
    if within:
        read_size(within)
    options = [pair for pair in pairs if pair[0] not in (*PLACES, *SWITCHES, "fit")]
    tried = attempt(options, given.get("config"), given.get("env"), given.get("example"))
    loaded, backends = checked(tried)
    if "show_config" in given:
        show(loaded, click.echo)
        return
    if "rehearse" in given:
        from simpletuner.training.rehearse import rehearse

        ctx.exit(rehearse(loaded, backends))
    with ExitStack() as beside:
        if "serve" in given:
            from simpletuner.cli.beside import served

            beside.enter_context(served(Path(loaded.run.training.output_dir).expanduser()))
        from simpletuner.training import run

        ctx.exit(run.train(loaded, backends, within))


def checked(tried: Attempt) -> tuple[Loaded, Backends]:
    """The configuration and its datasets, or a ConfigError with the problems of all files together."""
    problems = list(tried.problems)
    backends = None
    if tried.data is not None and tried.data.data_backend_config is not None:
        try:
            backends = read_backends(Path(tried.data.data_backend_config), tried.data)
        except ConfigError as error:
            problems.extend(error.problems)
    if tried.loaded is not None:
        run, source = tried.loaded.run, tried.loaded.source
        if run.model.mixed_precision == "fp16":
            problems.append(Problem(tried.loaded.origins["mixed_precision"], FP16))
        try:
            read_prompts(run.validation, source.parent if source else Path.cwd())
            if run.logging.webhook_config is not None:
                webhook.parse(run.logging.webhook_config)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems or tried.loaded is None or backends is None:
        raise ConfigError(problems)
    return tried.loaded, backends


def show(loaded: Loaded, echo: Callable[[str], None]) -> None:
    """Every value with its origin, by section; then the notes."""
    values = resolved(loaded.run)
    for group, options in groupby(catalog().values(), key=lambda option: option.group):
        echo(f"\n{group}")
        for option in options:
            value = json.dumps(values[option.name], ensure_ascii=False)
            echo(f"  {option.name:<42} {value:<32} {loaded.origins[option.name]}")
    echo("")
    for note in loaded.notes:
        echo(f"note: {note}")


def help_text(everything: bool) -> str:
    """The basic options by group, or all of them."""
    formatter = click.HelpFormatter(width=110)
    formatter.write_usage(
        "simpletuner train", "[--config PATH | --env NAME | --example NAME] [--OPTION VALUE ...]"
    )
    with formatter.section("Where the configuration comes from"):
        formatter.write_dl(
            [(f"--{name} {text.split('  ')[0]}", text.split("  ")[1]) for name, text in PLACES.items()]
        )
    with formatter.section("Instead of training, or beside it"):
        switches = {**SWITCHES, **FIT}.items()
        formatter.write_dl([(f"--{name.replace('_', '-')}", text) for name, text in switches])
    for group, options in groupby(catalog().values(), key=lambda option: option.group):
        rows = [
            (f"--{option.name}", f"{option.text}  [{option.takes}; default {json.dumps(option.default)}]")
            for option in options
            if everything or option.level == "basic"
        ]
        if rows:
            with formatter.section(group):
                formatter.write_dl(rows, col_max=34)
    formatter.write_paragraph()
    formatter.write_text(
        "Also --option=value and option=value; - and _ alike. Search: simpletuner options [WORD]"
    )
    return formatter.getvalue().rstrip()

"""simpletuner train: read and check everything first, import torch only if all is valid."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simpletuner.config import environment, flags
from simpletuner.config.option_catalog import all_options
from simpletuner.config.option_values import parse_memory_size
from simpletuner.errors import ConfigError, Problem

if TYPE_CHECKING:
    from simpletuner.config.launch_environment import LaunchedProcess
    from simpletuner.config.load import LoadedConfig
    from simpletuner.data.dataset_config import DatasetFile

CONFIG_SOURCE_FLAGS = {
    "config": "PATH  a configuration file, or its folder",
    "env": "NAME  the environment config/NAME",
    "example": "NAME  a packaged example (simpletuner examples list)",
}
FIT_FLAG = {
    "fit [12GB]": (
        "pick the fastest settings that fit this much memory (default: free memory); repeat it "
        "when resuming"
    ),
}
SWITCHES = {
    "show_config": "print every value and its origin, and exit",
    "rehearse": (
        "dry run: a few steps with your dataset and options on the bundled tiny model, on the CPU"
    ),
    "serve": "show the run in the web UI on http://localhost:8001 while it trains",
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
    """Train with the configuration in config.json, changed by flags."""
    pairs = flags.parse_flags(
        ["--help" if word == "-h" else word for word in words], tuple(SWITCHES)
    )
    given = dict(pairs)
    if "help" in given or "help_all" in given:
        click.echo(format_help(everything="help_all" in given))
        return
    within = check_sources_and_fit(given)
    options = [pair for pair in pairs if pair[0] not in (*CONFIG_SOURCE_FLAGS, *SWITCHES, "fit")]
    # Not before the flags are known to be in order: --help and a typing error need none of it.
    from simpletuner.cli.checked_config import require_config_and_datasets, require_extras
    from simpletuner.config.load import try_load_config

    tried = try_load_config(options, given.get("config"), given.get("env"), given.get("example"))
    loaded, backends = require_config_and_datasets(tried)
    if "show_config" in given:
        print_config(loaded, backends.notices, click.echo)
        return
    process = join_launcher(loaded)
    if loaded.config.tuning.learning_rate_search and "rehearse" not in given:
        loaded, pairs = search_rate(loaded, backends, process, pairs)
    if "rehearse" in given:
        if process is not None and process.size > 1:
            raise ConfigError("--rehearse runs in one process; start it without a launcher")
        from simpletuner.training.rehearse import rehearse

        ctx.exit(rehearse(loaded, backends))
    require_extras(loaded)
    if process is None and "serve" not in given and reports_finished_run(loaded, backends):
        return
    require_sources(backends, process)
    with ExitStack() as beside:
        if "serve" in given and (process is None or process.rank == 0):
            from simpletuner.cli.serve_while_training import serve_while_training

            beside.enter_context(
                serve_while_training(Path(os.path.expanduser(loaded.config.training.output_dir)))
            )
        if process is None and loaded.config.distributed.num_processes != 1:
            from simpletuner.training import launcher

            count = launcher.count_processes(loaded.config)
            if count > 1:
                ctx.exit(launcher.launch(loaded.config, count, rank_command(pairs)))
        from simpletuner.training import run

        ctx.exit(run.run_training(loaded, backends, within))


def check_sources_and_fit(given: Mapping[str, str | None]) -> str | None:
    """Return the limit of --fit: "" is the free memory, None is without --fit.

    Raises ConfigError for a flag without its value, and for --fit where it has no meaning.
    """
    empty = [
        Problem(f"--{name}", "needs a value")
        for name in CONFIG_SOURCE_FLAGS
        if name in given and not given[name]
    ]
    if empty:
        raise ConfigError(empty)
    if "fit" in given and not given.keys().isdisjoint(("rehearse", "show_config")):
        raise ConfigError(
            "--fit applies to the training itself; simpletuner plan --fit shows what it would "
            "choose"
        )
    within = (given["fit"] or "") if "fit" in given else None
    if within:
        parse_memory_size(within)
    return within


def search_rate(
    loaded: LoadedConfig,
    backends: DatasetFile,
    process: LaunchedProcess | None,
    pairs: list[tuple[str, str | None]],
) -> tuple[LoadedConfig, list[tuple[str, str | None]]]:
    """Return the configuration and the flags with the learning rate that a search finds."""
    from simpletuner.cli.rate_search import search_before_training

    with_rate, rate = search_before_training(loaded, backends, process is not None)
    return with_rate, [*pairs, ("learning_rate", rate)]


def require_sources(backends: DatasetFile, process: LaunchedProcess | None) -> None:
    """Check in one process that the images can be reached."""
    if process is None or process.rank == 0:
        from simpletuner.data.source_check import check_sources

        check_sources([*backends.train, *backends.eval])


def reports_finished_run(loaded: LoadedConfig, backends: DatasetFile) -> bool:
    """Print a report where the run has nothing left to do, and return whether that is so."""
    from simpletuner.training.finished_run import end_finished_run

    report = end_finished_run(loaded.config, backends)
    if report is not None:
        click.echo(report)
    return report is not None


def join_launcher(loaded: LoadedConfig) -> LaunchedProcess | None:
    """Return this process among those of a launcher; None where none has started it.

    Must be called before torch is imported. Raises ConfigError where the configuration contradicts
    what was started.
    """
    from simpletuner.config import launch_environment
    from simpletuner.config.distributed_constraints import visible_devices

    environ = environment.copy_process_environment()
    starter = environ.get(launch_environment.PARENT_VARIABLE)
    if starter is not None and int(starter) == os.getppid():
        from simpletuner.training.parent_watch import end_with_parent

        end_with_parent(int(starter))
    options = loaded.config.distributed
    process = launch_environment.read_launched_process(environ, options)
    launch_environment.check_agreement(loaded.config, process, loaded.origins)
    environment.set_device_variables(loaded.config.model.deterministic)
    gpus = visible_devices(options)
    if gpus is not None:
        environment.restrict_visible_gpus(gpus)
    if process is not None:
        environment.set_missing_variables(
            launch_environment.variables_of_ranks(process, sys.platform)
        )
        parent = environ.get(launch_environment.LAUNCHER_VARIABLE)
        if parent is not None:
            from simpletuner.training.parent_watch import end_with_parent

            end_with_parent(int(parent))
    return process


def rank_command(pairs: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return the command of each process: the flags as given, without those for the terminal."""
    flags_of_ranks = [
        f"--{name}" if value is None else f"--{name}={value}"
        for name, value in pairs
        if name != "serve"
    ]
    return [sys.executable, "-m", "simpletuner", "train", *flags_of_ranks]


def print_config(
    loaded: LoadedConfig, dataset_notices: Sequence[str], echo: Callable[[str], None]
) -> None:
    """Print every value with its origin, by section; then the notices."""
    from simpletuner.config.load import resolved_options

    values = resolved_options(loaded.config)
    for group, options in groupby(all_options().values(), key=lambda option: option.group):
        echo(f"\n{group}")
        for option in options:
            value = json.dumps(values[option.name], ensure_ascii=False)
            echo(f"  {option.name:<42} {value:<32} {loaded.origins[option.name]}")
    echo("")
    for notice in (*loaded.notices, *dataset_notices):
        echo(f"note: {notice}")
    if loaded.config.model.gradient_checkpointing == "auto":
        from simpletuner.training.finished_run import describe_stored_choice

        echo(f"note: {describe_stored_choice(loaded.config)}")


def format_help(everything: bool) -> str:
    """Return the help text: the basic options by group, or all of them."""
    formatter = click.HelpFormatter(width=110)
    formatter.write_usage(
        "simpletuner train", "[--config PATH | --env NAME | --example NAME] [--OPTION VALUE ...]"
    )
    with formatter.section("Configuration source"):
        formatter.write_dl(
            [
                (f"--{name} {text.split('  ')[0]}", text.split("  ")[1])
                for name, text in CONFIG_SOURCE_FLAGS.items()
            ]
        )
    with formatter.section("Other flags"):
        switches = {**SWITCHES, **FIT_FLAG}.items()
        formatter.write_dl([(f"--{name.replace('_', '-')}", text) for name, text in switches])
    for group, options in groupby(all_options().values(), key=lambda option: option.group):
        rows = [
            (
                f"--{option.name}",
                f"{option.text}  [{option.takes}; default {json.dumps(option.default)}]",
            )
            for option in options
            if everything or option.level == "basic"
        ]
        if rows:
            with formatter.section(group):
                formatter.write_dl(rows, col_max=34)
    formatter.write_paragraph()
    formatter.write_text(
        "--option=value and option=value work too; - and _ are equivalent. Search: simpletuner "
        "options [WORD]"
    )
    return formatter.getvalue().rstrip()

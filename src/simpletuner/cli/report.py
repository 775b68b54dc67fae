"""simpletuner report: one self-contained page about a run."""

from __future__ import annotations

from pathlib import Path

import click

from simpletuner.errors import ConfigError


@click.command("report")
@click.argument("run_dir", type=click.Path(path_type=Path))
def command(run_dir: Path) -> None:
    """Write report.html into RUN_DIR from its events.jsonl, and print its path."""
    from simpletuner.config.load import resolved_options
    from simpletuner.config.schema import RunConfig
    from simpletuner.events.html_report import write_report

    if not (run_dir / "events.jsonl").is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no events.jsonl")
    click.echo(write_report(run_dir, resolved_options(RunConfig())))

"""simpletuner examples: list the packaged examples, copy one to work on."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from simpletuner.config.discovery import example_folder, example_names
from simpletuner.errors import ConfigError


@click.group("examples")
def command() -> None:
    """List or copy the packaged examples: complete configurations to train with or start from."""


@command.command("list")
def list_examples() -> None:
    """List the names, one per line."""
    for name in example_names():
        click.echo(name)


@command.command("copy")
@click.argument("name")
@click.option(
    "--dest", "-d", type=click.Path(path_type=Path), default=Path(), help="Folder to copy into."
)
def copy_example(name: str, dest: Path) -> None:
    """Copy an example's files into a folder. No existing file is overwritten."""
    source = example_folder(name)
    files = sorted(
        path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    targets = [dest / path.relative_to(source) for path in files]
    present = [str(target) for target in targets if target.exists()]
    if present:
        raise ConfigError(
            f"nothing was copied, because {', '.join(present)} already exists; choose another "
            "--dest"
        )
    for path, target in zip(files, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        click.echo(target)

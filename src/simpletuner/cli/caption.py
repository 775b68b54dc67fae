"""simpletuner caption: write captions of images with a vision-language model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from simpletuner.config.captioning_models import DEFAULT_PROMPT, KNOWN_MODELS
from simpletuner.errors import ConfigError, Problem

FOLDER_TYPE = click.Path(path_type=Path, file_okay=False, exists=True, resolve_path=True)


@click.command("caption")
@click.argument("folder", type=FOLDER_TYPE)
@click.option(
    "--model",
    default=KNOWN_MODELS[0].id,
    show_default=True,
    help="Hugging Face repository or local folder of a model with safetensors files.",
)
@click.option(
    "--prompt", default=DEFAULT_PROMPT, show_default=True, help="The request to the model."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 1024),
    default=160,
    show_default=True,
    help="Longest caption, in tokens.",
)
@click.option(
    "--overwrite", is_flag=True, help="Also replace captions that exist, whoever wrote them."
)
@click.option(
    "--files",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON list of images of the folder to caption; others are left alone.",
)
@click.option(
    "--exclude",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON list of images of the folder to leave alone.",
)
@click.option(
    "--record",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Append each caption to this file; images in it are not captioned again.",
)
def command(
    folder: Path,
    model: str,
    prompt: str,
    max_tokens: int,
    overwrite: bool,
    files: Path | None,
    exclude: Path | None,
    record: Path | None,
) -> None:
    """Write a .txt file next to each image of FOLDER that has no caption.

    The same command continues where it was interrupted. No code of the model's repository is run.
    """
    from simpletuner.cli.captioning import CaptioningRequest, caption_images
    from simpletuner.data.image_choices import read_excluded

    if not prompt.strip():
        raise ConfigError([Problem("--prompt", "is empty")])
    names = None if files is None else _read_names(files, "--files")
    excluded = [] if exclude is None else _read_names(exclude, "--exclude")
    request = CaptioningRequest(
        folder,
        model,
        prompt.strip(),
        max_tokens,
        overwrite,
        None if names is None else tuple(names),
        frozenset(read_excluded(excluded)),
        record,
    )
    written = caption_images(request, click.echo)
    click.echo(f"{written} captions written" if written != 1 else "1 caption written")


def _read_names(path: Path, option: str) -> list[str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem(option, f"{path} is not a JSON list: {error}")]) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError([Problem(option, f"{path} is not a JSON list of file names")])
    return names

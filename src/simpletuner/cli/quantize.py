"""simpletuner quantize: convert the base ahead of time, so that training starts at once."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from simpletuner.config import flags
from simpletuner.config.load import load
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError
from simpletuner.events.terminal import Terminal

PLACES = ("config", "env", "example")


@click.command(
    "quantize", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Convert the weights that a configuration wants quantised, and print the files.

    Takes what `train` takes: --config PATH, --env NAME, --example NAME, and any option, such as
    --base_model_precision nf4. A conversion that was stopped goes on; a finished one is found again.
    """
    given = flags.pairs(list(words))
    places = {name: value for name, value in given if name in PLACES}
    options = [pair for pair in given if pair[0] not in PLACES]
    loaded = load(options, places.get("config"), places.get("env"), places.get("example"), needs_data=False)
    for note in loaded.notes:
        if "is read as" in note:  # the others are about a training
            click.echo(f"note: {note}", err=True)
    for file in quantize(loaded.run.model):
        click.echo(file)


def quantize(options: ModelOptions) -> list[Path]:
    """The converted files, one for each part. ConfigError when the options want nothing quantised."""
    if {options.base_model_precision, options.text_encoder_1_precision} == {"no_change"}:
        raise ConfigError(
            "nothing is to be quantised: set base_model_precision or text_encoder_1_precision,"
            " for example --base_model_precision=nf4"
        )
    from simpletuner.models.registry import family as family_named
    from simpletuner.training.device import choose

    family = family_named(options.model_family)
    shown = Terminal(sys.stderr)
    try:
        return family.quantize(family.locate(options, shown), options, choose(options).device, shown)
    finally:
        shown.close()

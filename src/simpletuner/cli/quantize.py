"""simpletuner quantize: quantize the base model ahead of time, so that training starts faster."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from simpletuner.config import flags
from simpletuner.config.load import load_config
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError
from simpletuner.events.terminal_sink import TerminalSink

CONFIG_SOURCE_FLAGS = ("config", "env", "example")


@click.command(
    "quantize", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Quantize the weights as a configuration specifies, and print the files.

    Takes the flags of `train`: --config PATH, --env NAME, --example NAME, and any option, such as
    --base_model_precision nf4. An interrupted conversion is resumed; a finished one is reused.
    """
    given = flags.parse_flags(list(words))
    places = {name: value for name, value in given if name in CONFIG_SOURCE_FLAGS}
    options = [pair for pair in given if pair[0] not in CONFIG_SOURCE_FLAGS]
    loaded = load_config(
        options, places.get("config"), places.get("env"), places.get("example"), needs_data=False
    )
    for note in loaded.notices:
        if "is read as" in note:  # the other notices concern training
            click.echo(f"note: {note}", err=True)
    for file in quantize_base(loaded.config.model):
        click.echo(file)


def quantize_base(options: ModelOptions) -> list[Path]:
    """Return the quantized files, one for each part.

    Raises ConfigError when the options quantize nothing.
    """
    if {options.base_model_precision, options.text_encoder_1_precision} == {"no_change"}:
        raise ConfigError(
            "nothing to quantize: set base_model_precision or text_encoder_1_precision,"
            " for example --base_model_precision=nf4"
        )
    from simpletuner.models.registry import get_family as family_named
    from simpletuner.training.device import select_device

    family = family_named(options.model_family)
    shown = TerminalSink(sys.stderr)
    try:
        return family.write_quantized_files(
            family.locate_files(options, shown), options, select_device(options).device, shown
        )
    finally:
        shown.close()

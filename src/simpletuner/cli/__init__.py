"""The command line. A command's module is imported only when it is chosen: `--help` stays quick."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import click

from simpletuner import __version__
from simpletuner.errors import SimpleTunerError

# command -> (module with an attribute `command`, one line of help)
COMMANDS: Mapping[str, tuple[str, str]] = {
    "configure": ("simpletuner.cli.configure", "Ask a dozen questions and write a configuration."),
    "train": ("simpletuner.cli.train", "Train; the same command goes on with a run."),
    "plan": (
        "simpletuner.cli.plan",
        "What a training will need, and what to change so that it fits.",
    ),
    "generate": ("simpletuner.cli.generate", "Draw pictures with the base and any LoRA."),
    "quantize": ("simpletuner.cli.quantize", "Convert a quantised base ahead of time."),
    "export": ("simpletuner.cli.export", "A LoRA for another program, or what each does with it."),
    "merge": ("simpletuner.cli.merge", "LoRAs into the base, as a model of its own."),
    "publish": ("simpletuner.cli.publish", "A finished run to the hub."),
    "report": ("simpletuner.cli.report", "Write report.html of a run folder."),
    "server": ("simpletuner.cli.server", "The pages in a browser: pictures, runs, queue."),
    "options": ("simpletuner.cli.options", "Search the options, with help."),
    "examples": ("simpletuner.cli.examples", "List and copy the packaged examples."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-v", "--version", prog_name="simpletuner")
def command_group(**_: Any) -> None:
    """Fine-tune Chroma 1.

    Start with: simpletuner train --example chroma-nano.peft-lora
    """


def main() -> None:
    """The console script. What a person can mend is told in sentences with an exit code, no traceback."""
    try:
        command_group(prog_name="simpletuner")
    except SimpleTunerError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)

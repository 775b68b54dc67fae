"""Command line. The module of a command is imported only when it is used, so --help is fast."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click

from simpletuner import __version__
from simpletuner.config import environment
from simpletuner.errors import (
    DISK_FULL_ERRNOS,
    STORAGE_HINTS,
    ConfigError,
    Problem,
    SimpleTunerError,
    storage_error,
)

# command -> (module with an attribute `command`, one line of help)
COMMANDS: Mapping[str, tuple[str, str]] = {
    "configure": ("simpletuner.cli.configure", "Create a config interactively."),
    "train": ("simpletuner.cli.train", "Train. Run the same command again to resume."),
    "inspect": (
        "simpletuner.cli.inspect",
        "Look at a dataset: sizes, captions, copies, blurred images.",
    ),
    "caption": (
        "simpletuner.cli.caption",
        "Write captions of images with a vision-language model.",
    ),
    "plan": (
        "simpletuner.cli.plan",
        "Estimate memory, disk and time, and find settings that fit.",
    ),
    "tune": (
        "simpletuner.cli.tune",
        "Find the learning rate by short trainings.",
    ),
    "generate": ("simpletuner.cli.generate", "Generate images with the base model and any LoRA."),
    "quantize": ("simpletuner.cli.quantize", "Quantize the base model ahead of training."),
    "export": (
        "simpletuner.cli.export",
        "Convert a LoRA for another program, or check its compatibility.",
    ),
    "merge": ("simpletuner.cli.merge", "Merge LoRAs into the base model."),
    "publish": ("simpletuner.cli.publish", "Upload a finished run to Hugging Face."),
    "report": ("simpletuner.cli.report", "Write report.html for a run."),
    "server": ("simpletuner.cli.server", "Start the web UI."),
    "options": ("simpletuner.cli.options", "Search the options and their help."),
    "examples": ("simpletuner.cli.examples", "List and copy the packaged examples."),
}


class LazyGroup(click.Group):
    """A group whose commands are listed in COMMANDS."""

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
            hint = (
                f"did you mean {close[0]!r}?"
                if close
                else f"the commands are: {', '.join(COMMANDS)}"
            )
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
    """Run the console script.

    Errors that a user can fix are printed as sentences, with an exit code and without a traceback.
    """
    try:
        refuse_undecodable_arguments(sys.argv[1:])
        environment.set_compiled_code_dir()
        command_group(prog_name="simpletuner")
    except SimpleTunerError as error:
        end_with_message(error)
    except OSError as error:
        # The outermost edge: what no command expected of the file system. Errors of the network
        # have no number among these, and keep their traceback.
        if error.errno not in (*DISK_FULL_ERRNOS, *STORAGE_HINTS):
            raise
        end_with_message(storage_error(str(error.filename or "a file"), error))


def end_with_message(error: SimpleTunerError) -> NoReturn:
    """Print the message, without control characters that it may quote, and exit."""
    text = "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
        for character in str(error)
    )
    print(text, file=sys.stderr)
    sys.exit(error.exit_code)


def refuse_undecodable_arguments(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an argument that is not valid text in the encoding of the terminal.

    Configurations, prompts and logs are UTF-8 and cannot hold it.
    """
    problems = [
        Problem(f"argument {number}", f"{word!a} is not valid UTF-8")
        for number, word in enumerate(arguments, 1)
        if any("\ud800" <= character <= "\udfff" for character in word)
    ]
    if problems:
        raise ConfigError(problems)

"""What `simpletuner configure` asks, in the order in which a person thinks, and who is asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from simpletuner.config.option_catalog import all_options

HELP_ANSWER, BACK_ANSWER = "?", "<"
FULL_SIZE_FLAVOURS = ("base", "hd", "flash")


@dataclass(frozen=True)
class Question:
    """name: an option, or a field of the dataset file. needs: asked only where these have such values;
    "captions" is what was found beside the pictures: all, some, none.
    """

    name: str
    text: str
    required_values: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def applies(self, known: Callable[[str], Any]) -> bool:
        return all(known(name) in values for name, values in self.required_values.items())

    @property
    def choices(self) -> tuple[str, ...]:
        option = all_options().get(self.name)
        if option is None or option.kind not in ("choice", "amount"):
            return ()
        return option.choices if option.kind == "choice" else ("true", "false", *option.choices)

    @property
    def help(self) -> str:
        option = all_options().get(self.name)
        if option is None:
            return (
                "The folder with your pictures, folders in it included; photo.txt beside "
                "photo.jpg is its caption. It is only ever read."
            )
        unit = f" ({option.unit})" if option.unit else ""
        return f"{option.name}: {option.text} Takes {option.takes}{unit}; default {json.dumps(option.default)}."


LORA_ONLY, FULL_RANK_ONLY = {"model_type": ("lora",)}, {"model_type": ("full",)}
QUESTIONS = (
    Question("instance_data_dir", "Which folder holds the pictures?"),
    Question(
        "caption_strategy", "Where do their captions come from?", {"captions": ("some", "none")}
    ),
    Question(
        "missing_caption",
        "And pictures without one?",
        {"captions": ("some",), "caption_strategy": ("textfile",)},
    ),
    Question("instance_prompt", "One caption for all?", {"caption_strategy": ("instanceprompt",)}),
    Question("model_type", "Teach a LoRA, or change every weight?"),
    Question("lora_rank", "How large a LoRA (rank)?", LORA_ONLY),
    Question("optimizer", "Which optimizer?", FULL_RANK_ONLY),
    Question("model_flavour", "Which Chroma to start from?"),
    Question(
        "pretrained_model_name_or_path",
        "Another folder or repository of it? Blank for none.",
        {"model_flavour": FULL_SIZE_FLAVOURS},
    ),
    Question("resolution", "Which resolution to train at?"),
    Question("train_batch_size", "How many pictures at once?"),
    Question(
        "base_model_precision",
        "How to store the frozen base?",
        {**LORA_ONLY, "model_flavour": FULL_SIZE_FLAVOURS},
    ),
    Question("gradient_checkpointing", "Recompute blocks to save memory?"),
    Question("max_train_steps", "How many steps?"),
    Question("learning_rate", "At which learning rate?"),
    Question("validation_prompt", "What to draw as a preview? Blank for nothing."),
    Question("output_dir", "Where to write the results?"),
)


class PipePrompter:
    """Questions through a pipe: a line each. patient: asked again after an answer that cannot be."""

    interactive = True

    def ask(self, text: str, choices: Sequence[str], proposed: str) -> str:
        among = f" ({', '.join(choices)})" if choices else ""
        click.echo(f"{text}{among} [{proposed}]")
        line = sys.stdin.readline()
        if not line:
            raise click.UsageError(
                f"the input ended at {text!r}; --defaults takes what is proposed"
            )
        return line

    def show_text(self, text: str) -> None:
        click.echo(text)


class DefaultsPrompter(PipePrompter):
    """--defaults: yes to everything."""

    interactive = False

    def ask(self, text: str, choices: Sequence[str], proposed: str) -> str:
        return ""


class TerminalPrompter(PipePrompter):
    """Questions on a terminal: lists to choose from, lines to type."""

    def ask(self, text: str, choices: Sequence[str], proposed: str) -> str:
        import questionary

        if not choices or proposed not in choices:
            return str(questionary.text(f"{text} [{proposed}]").unsafe_ask())
        extra = [
            questionary.Choice("? help", HELP_ANSWER),
            questionary.Choice("< back", BACK_ANSWER),
        ]
        listed = [*(questionary.Choice(word, word) for word in choices), *extra]
        return str(questionary.select(text, listed, default=proposed).unsafe_ask())


def format_answer(value: Any) -> str:
    """As a person would type it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)

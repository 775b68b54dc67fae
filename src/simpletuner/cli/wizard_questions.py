"""Questions of `simpletuner configure`, in order, and the prompters that ask them."""

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
    """One question. name: an option, or a field of the dataset file.

    required_values: the question is asked only where these options have such values; "captions" is
    all, some or none of the images.
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
                "Folder of your images, including subfolders; photo.txt next to photo.jpg is its "
                "caption. Nothing in it is changed."
            )
        unit = f" ({option.unit})" if option.unit else ""
        default = json.dumps(option.default)
        return f"{option.name}: {option.text} Takes {option.takes}{unit}; default {default}."


LORA_ONLY, FULL_RANK_ONLY = {"model_type": ("lora",)}, {"model_type": ("full",)}
QUESTIONS = (
    Question("instance_data_dir", "Image folder?"),
    Question("caption_strategy", "Source of captions?", {"captions": ("some", "none")}),
    Question(
        "missing_caption",
        "Images without a caption?",
        {"captions": ("some",), "caption_strategy": ("textfile",)},
    ),
    Question(
        "instance_prompt", "Caption for all images?", {"caption_strategy": ("instanceprompt",)}
    ),
    Question("model_type", "Train a LoRA or the full model?"),
    Question("lora_rank", "LoRA rank?", LORA_ONLY),
    Question("optimizer", "Optimizer?", FULL_RANK_ONLY),
    Question("model_flavour", "Which base model?"),
    Question(
        "pretrained_model_name_or_path",
        "Custom base model (folder or repository)? Blank for the flavour's own.",
        {"model_flavour": FULL_SIZE_FLAVOURS},
    ),
    Question("resolution", "Training resolution?"),
    Question("train_batch_size", "Batch size?"),
    Question(
        "base_model_precision",
        "Quantize the base model?",
        {**LORA_ONLY, "model_flavour": FULL_SIZE_FLAVOURS},
    ),
    Question("gradient_checkpointing", "Enable gradient checkpointing?"),
    Question("max_train_steps", "Number of steps?"),
    Question("learning_rate", "Learning rate?"),
    Question("validation_prompt", "Prompt for validation images? Blank for none."),
    Question("output_dir", "Output folder?"),
)


class PipePrompter:
    """Ask through a pipe, one line each.

    interactive: an invalid answer is asked for again.
    """

    interactive = True

    def ask(self, text: str, choices: Sequence[str], proposed: str) -> str:
        among = f" ({', '.join(choices)})" if choices else ""
        click.echo(f"{text}{among} [{proposed}]")
        line = sys.stdin.readline()
        if not line:
            raise click.UsageError(
                f"the input ended at {text!r}; use --defaults to accept all proposed answers"
            )
        return line

    def show_text(self, text: str) -> None:
        click.echo(text)


class DefaultsPrompter(PipePrompter):
    """Accept every proposed answer (--defaults)."""

    interactive = False

    def ask(self, text: str, choices: Sequence[str], proposed: str) -> str:
        return ""


class TerminalPrompter(PipePrompter):
    """Ask on a terminal: lists to choose from, and text input."""

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
    """Return the value as a user would type it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)

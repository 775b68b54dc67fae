"""simpletuner configure: a dozen questions, and a configuration that trains."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from simpletuner.cli.wizard import ConfigWizard
from simpletuner.cli.wizard_questions import (
    BACK_ANSWER,
    HELP_ANSWER,
    QUESTIONS,
    DefaultsPrompter,
    PipePrompter,
    TerminalPrompter,
    format_answer,
)
from simpletuner.config.discovery import candidate_paths, find_config
from simpletuner.config.option_catalog import all_options, option_aliases
from simpletuner.config.option_values import did_you_mean
from simpletuner.config.paths import display_path as short
from simpletuner.errors import ConfigError, Problem, SimpleTunerError


@click.command("configure")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the two files.")
@click.option("--env", metavar="NAME", help="Write to the folder config/NAME.")
@click.option("--defaults", is_flag=True, help="Ask nothing; accept all proposed answers.")
@click.option(
    "--set", "pairs", multiple=True, metavar="OPTION=VALUE", help="Set an option; may be repeated."
)
@click.option("--force", is_flag=True, help="Overwrite existing files without asking.")
def command(
    output: Path | None, env: str | None, defaults: bool, pairs: tuple[str, ...], force: bool
) -> None:
    """Create or edit config.json and multidatabackend.json interactively.

    `?` explains a question, `<` goes back, Enter accepts the proposed answer. An existing
    configuration is edited: options that are not asked for stay as they are.
    """
    cwd = Path.cwd()
    target = _resolve_target_file(output, env, cwd)
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not defaults
    speaker = DefaultsPrompter() if defaults else TerminalPrompter() if terminal else PipePrompter()
    wizard = ConfigWizard(speaker, target, cwd, _parse_set_options(pairs))
    present = " and ".join(
        short(path, cwd) for path in (target, wizard.dataset_file) if path.exists()
    )
    if present and not terminal and not force:
        raise ConfigError(
            f"{present} already exists; add --force to edit, or choose another --output"
        )
    try:
        if present:
            speaker.show_text(
                f"{present} already exists and will be edited; comments in it will be lost."
            )
        ask_questions(speaker, wizard, wizard.settled_names)
        config, sets = wizard.build_files()
        if speaker.interactive:
            speaker.show_text(wizard.describe_planned_memory())
        if present and not force and not click.confirm(f"Overwrite {present}?", default=False):
            speaker.show_text("Nothing was written.")
            return
    finally:
        wizard.close()
    from simpletuner.atomic_io import write_atomically

    target.parent.mkdir(parents=True, exist_ok=True)
    for path, content in ((wizard.dataset_file, sets), (target, config)):
        write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        speaker.show_text(f"Wrote {short(path, cwd)}")
    usual = target in (*candidate_paths(cwd), *candidate_paths(cwd / "config"))
    where = f" --env {env}" if env else "" if usual else f" --config {short(target, cwd)}"
    speaker.show_text(
        f"Dry run:  simpletuner train{where} --rehearse\nTrain:    simpletuner train{where}"
    )


def ask_questions(speaker: PipePrompter, wizard: ConfigWizard, settled: Sequence[str]) -> None:
    """Ask every question that applies and is not settled.

    `?` explains, `<` goes back, a blank answer accepts the proposed value; an answer that is
    refused is explained and asked for again.
    """
    trail: list[int] = []
    at = 0
    last_shown = -1
    while at < len(QUESTIONS):
        question = QUESTIONS[at]
        if question.name in settled or not question.applies(wizard.current_value):
            at += 1
            continue
        context = wizard.question_context(question.name) if at != last_shown else ""
        if context:
            speaker.show_text(context)
        last_shown = at
        proposed = wizard.proposed_value(question.name)
        reply = speaker.ask(question.text, question.choices, format_answer(proposed)).strip()
        if reply == HELP_ANSWER:
            speaker.show_text(question.help)
        elif reply == BACK_ANSWER:
            at = trail.pop() if trail else at
        else:
            try:
                wizard.set_answer(question.name, reply or proposed)
            except SimpleTunerError as error:
                if not speaker.interactive:
                    raise
                speaker.show_text(str(error))
                continue
            trail.append(at)
            at += 1


def _resolve_target_file(output: Path | None, env: str | None, cwd: Path) -> Path:
    """Return the file to write: the existing one, else config.json."""
    if output and env:
        raise ConfigError("--output and --env both name a folder; use one of them")
    if env and not re.fullmatch(r"[\w-][\w.-]*", env):
        raise ConfigError(f"--env {env}: a name has letters, digits, dots, - and _")
    folder = cwd / output if output else cwd / "config" / env if env else None
    there = find_config(None, None, None, cwd) if folder is None else None
    if folder is not None:
        there = next((path for path in candidate_paths(folder) if path.is_file()), None)
    if there is not None and there.suffix == ".toml":
        raise ConfigError(
            f"{short(there, cwd)} is TOML, which this command cannot write; choose another --output"
        )
    return there or (folder or cwd) / "config.json"


def _parse_set_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse --set into option -> text.

    instance_data_dir, the folder of the images, counts as an option.
    """
    values: dict[str, Any] = {}
    problems = []
    known = (*all_options(), "instance_data_dir")
    for pair in pairs:
        written, equals, value = pair.partition("=")
        name = written.lstrip("-").replace("-", "_")
        name = option_aliases().get(name, name)
        if not equals:
            problems.append(Problem("--set", f"{pair!r} is not of the form OPTION=VALUE"))
        elif name not in known:
            problems.append(Problem("--set", f"{name}: unknown option{did_you_mean(name, known)}"))
        values[name] = value
    if problems:
        raise ConfigError(problems)
    return values

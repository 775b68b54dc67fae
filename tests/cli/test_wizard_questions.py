"""The talk: order, help, back, the validator's word; every question is an option that people should
know.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from simpletuner.cli.configure import ask_questions
from simpletuner.cli.wizard_questions import QUESTIONS
from simpletuner.config.load import try_load_mapping
from simpletuner.config.option_catalog import all_options
from simpletuner.config.presets import (
    FULL_RANK_PRESET,
    MEMORY_PRESETS,
    NANO_PRESET,
    preset_for_memory,
)
from simpletuner.errors import ConfigError


class Script:
    """Answers by question, or in order; remembers what was asked and told."""

    def __init__(self, answers: Sequence[str], patient: bool = True) -> None:
        self.answers, self.interactive = list(answers), patient
        self.asked: list[tuple[str, str]] = []
        self.told: list[str] = []

    def ask(self, text: str, choices: Sequence[str], proposed: str) -> str:
        self.asked.append((next(one.name for one in QUESTIONS if one.text == text), proposed))
        return self.answers.pop(0) if self.answers else ""

    def show_text(self, text: str) -> None:
        self.told.append(text)


class Facts:
    """Takes anything but "wrong"."""

    def __init__(self, **facts: Any) -> None:
        self.facts = {"captions": "all"} | facts
        self.seen: list[str] = []

    def current_value(self, name: str) -> Any:
        return self.facts.get(name, all_options()[name].default if name in all_options() else None)

    def proposed_value(self, name: str) -> Any:
        return self.current_value(name)

    def question_context(self, name: str) -> str:
        self.seen.append(name)
        return f"about {name}"

    def set_answer(self, name: str, raw: Any) -> None:
        if raw == "wrong":
            raise ConfigError(f"{name} cannot be wrong")
        self.facts[name] = raw


def names(script: Script) -> list[str]:
    return [name for name, _ in script.asked]


def test_in_the_order_in_which_a_person_thinks() -> None:
    script = Script([])
    ask_questions(script, Facts(), ())
    assert names(script) == [
        "instance_data_dir", "model_type", "lora_rank", "model_flavour", "pretrained_model_name_or_path",
        "resolution", "train_batch_size", "base_model_precision", "gradient_checkpointing",
        "max_train_steps", "learning_rate", "validation_prompt", "output_dir",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "asked", "not_asked"),
    [
        ({"model_type": "full"}, {"optimizer"}, {"lora_rank", "base_model_precision"}),
        (
            {"model_flavour": "nano"},
            set(),
            {"pretrained_model_name_or_path", "base_model_precision"},
        ),
        ({"captions": "some"}, {"caption_strategy", "missing_caption"}, {"instance_prompt"}),
        (
            {"captions": "none", "caption_strategy": "instanceprompt"},
            {"instance_prompt"},
            {"missing_caption"},
        ),
    ],
)
def test_only_what_applies(facts: dict[str, Any], asked: set[str], not_asked: set[str]) -> None:
    script = Script([])
    ask_questions(script, Facts(**facts), ())
    assert asked <= set(names(script))
    assert not not_asked & set(names(script))


def test_help_back_and_refusal_ask_again() -> None:
    script = Script(["<", "?", "pics", "wrong", "full", "<", "lora", "8"])
    facts = Facts()
    ask_questions(script, facts, ())
    first = (
        ["instance_data_dir"] * 3 + ["model_type"] * 2 + ["optimizer", "model_type", "lora_rank"]
    )
    assert names(script)[: len(first)] == first
    assert script.asked[6] == ("model_type", "full")  # going back shows what was said
    assert facts.facts["lora_rank"] == "8"
    assert "model_type cannot be wrong" in script.told
    assert any("Nothing in it is changed" in told for told in script.told)
    assert script.told.count("about instance_data_dir") == 1


def test_what_is_settled_is_not_asked() -> None:
    script = Script([])
    ask_questions(script, Facts(), ("model_type", "output_dir"))
    assert not {"model_type", "output_dir"} & set(names(script))


def test_without_a_person_a_refusal_ends_it() -> None:
    with pytest.raises(ConfigError, match="cannot be wrong"):
        ask_questions(Script(["wrong"], patient=False), Facts(), ())


def test_questions_are_options_with_help() -> None:
    apart = {"instance_data_dir", "missing_caption", "instance_prompt"}
    for question in QUESTIONS:
        assert question.help
        if question.name not in apart:
            assert all_options()[question.name].level == "basic", question.name
            assert all_options()[question.name].text in question.help
        assert set(question.required_values) <= {*all_options(), "captions"}


def test_proposals_hold(tmp_path: Any) -> None:
    for options in (
        NANO_PRESET,
        {**FULL_RANK_PRESET, "model_type": "full"},
        *(row for row, _ in MEMORY_PRESETS),
    ):
        tried = try_load_mapping(options, tmp_path)
        assert tried.problems == ()


@pytest.mark.parametrize(
    ("gb", "precision"),
    [
        (80, "no_change"),
        (24, "no_change"),
        (16, "int8"),
        (12, "int8"),
        (10, "nf4"),
        (8, "nf4"),
        (2, "nf4"),
        (None, "nf4"),
    ],
)
def test_the_finest_that_fits(gb: int | None, precision: str) -> None:
    row, needed = preset_for_memory(None if gb is None else gb << 30)
    assert row["base_model_precision"] == precision
    assert gb in (2, None) or needed <= gb


def test_the_figures_are_those_of_the_memory_table() -> None:
    """Of the benchmarks' results: at 1024 px, and with all activations kept."""
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    rows = json.loads((results / "memory_table.json").read_text(encoding="utf-8"))
    kept = json.loads((results / "plan.json").read_text(encoding="utf-8"))
    roomy = next(row for row in kept if row["what"] == "no_change, all kept" and row["px"] == 1024)
    for options, gb in MEMORY_PRESETS:
        if options.get("gradient_checkpointing") is False:
            assert gb == roomy["planned_gb"]
            continue
        wanted = {"gradient_checkpointing": True, "lora_rank": 16, **options}
        planned = next(
            row["peak_gb"]
            for row in rows
            if row["px"] == 1024
            and {"base_model_precision": "no_change", **row["options"]} == wanted
        )
        assert gb == planned

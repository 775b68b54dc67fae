"""Relations between options are declared once: form, rules, documentation and plan all follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from simpletuner.cli.options import format_option
from simpletuner.config import constraints, docs
from simpletuner.config.load import config_from_resolved
from simpletuner.config.option import Need, Not, OptionSection, find_unmet_need, option, parse_needs
from simpletuner.config.option_catalog import Option, all_options, section_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_fields import COMMON_FIELDS, IMAGE_FIELDS
from simpletuner.data.dataset_file import try_read_datasets
from simpletuner.server import form_schema
from simpletuner.server.plan_service import plan_relevant_options

FORM = {info.name: info for info in form_schema.build_form_schema().options}
FIELD_FORM = {info.name: info for info in form_schema.build_form_schema().dataset_fields}
# A value that is not the default, where the declaration alone does not give one that is allowed.
VALUES = {
    "accelerate_visible_devices": "0,1",
    "alpha_background": "black",
    "cache_dir": "somewhere",
    "evaluation_type": "clip",
    "flow_custom_timesteps": "0.5",
    "lr_end": 1e-6,
    "lycoris_config": {"algo": "lokr"},
    "machine_rank": 1,
    "pretrained_model_name_or_path": ".",
    "report_to": "wandb",
    "scheduled_sampling_prob_end": 0.75,
    "user_prompt_library": "prompts.json",
    "validation_guidance_real": 2.0,
    "validation_image": "image.png",
    "validation_resolution": "512",
    "validation_strengths": "0.25",
    "caption_shuffle": {"enable": True, "count": 2},
    "caption_weights": [1, 2],
    "lora_rank_by_module": {".*": 4},
    "lr_by_module": {".*": 0.5},
}
PAGE_ROWS = [line for line in docs.render_options_page().splitlines() if line.startswith("| ")]
CONDITIONAL = [name for name, declared in all_options().items() if declared.needs]


def other_value(declared: Option) -> Any:
    """Return an allowed value that is not the default."""
    if declared.name in VALUES:
        return VALUES[declared.name]
    if declared.kind == "flag":
        return not declared.default
    if declared.kind == "amount":
        return False
    if declared.kind == "count":
        return 3 if declared.default != 3 else 4
    if declared.kind == "choice":
        others = (
            word for word in declared.choices if word not in (declared.default, declared.idle_value)
        )
        return next(others, "another")
    if declared.kind == "integer":
        return 3 if declared.default != 3 else 4
    if declared.kind == "number":
        return 0.5 if declared.default != 0.5 else 0.75
    return "text"


def violating(need: Need) -> Any:
    """Return a value with which the condition does not hold."""
    if need.negated:
        return need.values[0]
    declared = all_options().get(need.option) or {**COMMON_FIELDS, **IMAGE_FIELDS}[need.option]
    if declared.kind == "choice":
        return next(word for word in declared.choices if word not in need.values)
    return declared.default if declared.default not in need.values else other_value(declared)


def satisfying(need: Need) -> Any:
    """Return a value with which the condition holds."""
    if not need.negated:
        return need.values[0]
    declared = all_options()[need.option]
    return declared.default if declared.default not in need.values else other_value(declared)


def situations(declared: Option) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield (values of the needed options, whether the option has an effect)."""
    fulfilled = {group[0].option: satisfying(group[0]) for group in declared.needs}
    rest = {need.option: violating(need) for group in declared.needs for need in group[1:]}
    yield {**rest, **fulfilled}, True
    for group in declared.needs:
        yield {**rest, **fulfilled, **{need.option: violating(need) for need in group}}, False
        for need in group[1:]:
            first = {group[0].option: violating(group[0])}
            yield {**rest, **fulfilled, **first, need.option: satisfying(need)}, True


def shown(info: Any, values: Mapping[str, Any], table: Mapping[str, Any]) -> bool:
    """Return what the page computes (web/src/newrun/values.ts, `needed`) from the schema it
    receives.
    """

    def holds(name: str, allowed: list[Any]) -> bool:
        now = values.get(name, table[name].default)
        return any(
            now != value["not"] if isinstance(value, dict) and "not" in value else now == value
            for value in allowed
        )

    alternatives = info.needs_any.items()
    return all(holds(*item) for item in info.needs.items()) and (
        not alternatives or any(holds(*item) for item in alternatives)
    )


def reported(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether the rules say that the option has no effect, or refuse it for what it needs."""
    run = config_from_resolved({**values, name: other_value(all_options()[name])})
    given = dict.fromkeys((*values, name), "here")
    errors = [at for at, _ in constraints.find_errors(run, given)]
    warnings = [
        text for text in constraints.find_warnings(run, given) if " no effect with " in text
    ]
    return name in errors or any(name in text.split(" ha")[0].split(", ") for text in warnings)


@pytest.mark.parametrize(
    "name", [name for name in CONDITIONAL if all_options()[name].section != "data"]
)
def test_form_and_rules_agree_on_every_option(name: str) -> None:
    for values, has_effect in situations(all_options()[name]):
        assert shown(FORM[name], values, FORM) == has_effect, (name, values)
        assert reported(name, values) != has_effect, (name, values)


@pytest.mark.parametrize(
    "name", [name for name in IMAGE_FIELDS if IMAGE_FIELDS[name].needs] + ["missing_caption"]
)
def test_form_and_rules_agree_on_every_field_of_a_dataset(name: str, tmp_path: Path) -> None:
    """A field is judged with the values of its dataset, and the run's options with those of every
    dataset.
    """
    declared = IMAGE_FIELDS.get(name) or all_options()[name]
    info, table = (FIELD_FORM[name], FIELD_FORM) if name in FIELD_FORM else (FORM[name], FORM)
    defaults = {field: IMAGE_FIELDS[field].default for field in IMAGE_FIELDS}
    value = {"instance_prompt": ["p"], "crop_aspect_buckets": [1.0]}.get(
        name, other_value(declared)
    )
    for values, has_effect in situations(declared):
        of_run = RunConfig().data.model_copy(update={"instance_prompt": "p"})
        entry = {"id": "a", "instance_data_dir": str(tmp_path), **values}
        if name in IMAGE_FIELDS:
            entry[name] = value
        else:
            of_run = of_run.model_copy(update={name: value})
        # Some dataset must be active from the start.
        first = {"id": "b", "instance_data_dir": str(tmp_path)}
        entries = [entry, first] if name.startswith("start_") else [entry]
        read, problems = try_read_datasets(entries, tmp_path, of_run)
        texts = [*read.notices, *(problem.message for problem in problems)]
        quiet = not any(name in text and ("no effect" in text or "needs" in text) for text in texts)
        assert quiet == has_effect, (name, values, texts)
        assert shown(info, {**defaults, "dataset_type": "image", **values}, table) == has_effect, (
            values
        )


def test_a_run_option_is_used_where_one_dataset_needs_it(tmp_path: Path) -> None:
    of_run = RunConfig().data.model_copy(
        update={
            "missing_caption": "drop",
            "caption_strategy": "instanceprompt",
            "instance_prompt": "p",
        }
    )
    entries = [{"id": name, "instance_data_dir": str(tmp_path)} for name in "ab"]
    read, _ = try_read_datasets(entries, tmp_path, of_run)
    assert read.notices == (
        "missing_caption has no effect with caption_strategy instanceprompt: it needs caption_strategy "
        "textfile, filename, csv, jsonl, parquet or huggingface",
    )
    read, _ = try_read_datasets(
        [entries[0], {**entries[1], "caption_strategy": "textfile"}], tmp_path, of_run
    )
    assert read.notices == ()


@pytest.mark.parametrize("name", CONDITIONAL)
def test_the_documentation_says_what_an_option_needs(name: str) -> None:
    needs = all_options()[name].needs_text
    assert needs
    (row,) = (line for line in PAGE_ROWS if f"`{name}`" in line.split("|")[1])
    assert f"Needs {needs}." in row
    assert f"needs {needs}" in format_option(all_options()[name])


@pytest.fixture(scope="module")
def plan_keys() -> tuple[RunConfig, Callable[[RunConfig], str]]:
    """Return a run with a tiny model, and the function that gives a run's key of the plan."""
    pytest.importorskip("torch", reason="needs torch")
    from simpletuner.models.family import BlockMemoryPolicy
    from simpletuner.training.memory_plan import plan_cache
    from tests.training.memory_plan.tiny_family import (
        BATCH_SHAPE,
        make_model_spec,
        make_run_config,
    )

    plain = make_run_config()
    spec = make_model_spec(plain)
    return plain, lambda run: plan_cache.cache_key(run, spec, BlockMemoryPolicy(), BATCH_SHAPE, 1)


@pytest.mark.parametrize("name", list(all_options()))
def test_the_plan_depends_on_what_an_option_declares(
    name: str, plan_keys: tuple[RunConfig, Callable[[RunConfig], str]]
) -> None:
    plain, plan_key = plan_keys
    declared = all_options()[name]
    assert bool(plan_relevant_options({name: 1})) == bool(declared.affects)
    assert "plan" in declared.affects or not declared.affects
    run = plain.model_copy(
        update={
            declared.section: getattr(plain, declared.section).model_copy(
                update={name: changed_value(plain, declared)}
            )
        }
    )
    assert (plan_key(run) != plan_key(plain)) == ("step" in declared.affects)


def changed_value(run: RunConfig, declared: Option) -> Any:
    value = other_value(declared)
    now = constraints.value_reader(run)(declared.name)
    return value if value != now else f"{value} and more"


def test_relations_name_options_and_values_that_exist() -> None:
    for table in (all_options(), {**COMMON_FIELDS, **IMAGE_FIELDS}):
        for declared in table.values():
            for group in declared.needs:
                for need in group:
                    assert need.option != declared.name
                    needed = all_options().get(need.option) or table[need.option]
                    if needed.kind == "choice":
                        assert set(need.values) <= {*needed.choices}, declared.name
            names = {need.option for group in declared.needs for need in group}
            assert declared.unmet_errors.keys() <= names, declared.name


def test_an_undeclared_effect_is_an_effect() -> None:
    """A new option changes the key of the plan until its author declares that it does not."""

    class Section(OptionSection):
        """Section"""

        first: int = option(1, "One.", ge=0)
        second: int = option(1, "Two.", affects=set(), ge=0)

    table = section_options("section", Section)
    assert table["first"].affects == {"step", "plan"}
    assert table["second"].affects == frozenset()


def test_conditions() -> None:
    needs = parse_needs({"a": (1, 2), "b": Not(None)}, {"c": True, "d": "x"})
    values = {"a": 2, "b": "", "c": 1, "d": "x"}
    assert find_unmet_need(needs, values.__getitem__) is None
    assert find_unmet_need(needs, {**values, "d": "y"}.__getitem__) == needs[2]
    assert find_unmet_need(needs, {**values, "b": None}.__getitem__) == needs[1]
    assert find_unmet_need(needs, {**values, "a": True}.__getitem__) == needs[0]
    assert [str(group[0]) for group in needs] == ["a 1 or 2", "a value for b", "c true"]


@pytest.mark.parametrize(
    ("options", "is_named"),
    [
        ({}, True),
        ({"optimizer": "lion"}, True),
        ({"optimizer": "adamw_bf16"}, False),
        ({"base_model_default_dtype": "fp32"}, False),
        ({"mixed_precision": "no"}, False),
        ({"model_type": "lora"}, False),
        ({"deepspeed_config": '{"zero_optimization": {"stage": 2}}', "num_processes": 2}, False),
    ],
)
def test_full_rank_that_loses_small_updates_is_named(
    options: dict[str, Any], is_named: bool
) -> None:
    run = config_from_resolved({"model_type": "full", **options})
    named = [text for text in constraints.find_warnings(run, {}) if "rounds bf16 weights" in text]
    assert len(named) == is_named

"""The form schema is complete, agrees with the option schema, and its presets are the planner's."""

from __future__ import annotations

import json
import re
from pathlib import Path

from simpletuner.config.load import try_load_mapping
from simpletuner.config.option_catalog import all_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_fields import COMMON_FIELDS, IMAGE_FIELDS
from simpletuner.data.dataset_file import try_read_datasets
from simpletuner.server import form_schema

EVERY = {option.name: option for option in form_schema.build_form_schema().options}
FIELDS = {field.name: field for field in form_schema.build_form_schema().dataset_fields}


def test_every_option_once_in_the_schemas_order() -> None:
    assert list(EVERY) == list(all_options())
    assert EVERY["lora_rank"].bounds == "at least 1, at most 1024"
    assert EVERY["model_flavour"].choices == ["base", "hd", "flash", "nano"]
    assert EVERY["gradient_checkpointing"].kind == "amount"
    assert (
        json.loads(form_schema.build_form_schema().model_dump_json())["options"][0]["name"]
        == "model_family"
    )


def test_what_cannot_be_set_is_marked() -> None:
    assert {name for name, option in EVERY.items() if not option.settable} == set(
        form_schema.NOT_SETTABLE
    )


def test_fields_of_datasets_are_those_of_the_reader(tmp_path: Path) -> None:
    assert set(FIELDS) | set(form_schema.HIDDEN_DATASET_FIELDS) == set(IMAGE_FIELDS) | set(
        COMMON_FIELDS
    )
    assert FIELDS["crop_style"].choices == ["center", "random", "corner"]
    assert [FIELDS[name].kind for name in ("crop", "repeats", "probability")] == [
        "flag",
        "integer",
        "number",
    ]
    assert FIELDS["crop_aspect_buckets"].structured
    given = {name: field.default for name, field in FIELDS.items() if field.default is not None}
    sets = [{**given, "id": "a", "instance_data_dir": str(tmp_path), "crop_style": "center"}]
    written, problems = try_read_datasets(sets, tmp_path, RunConfig().data)
    plain, _ = try_read_datasets(
        [{"id": "a", "instance_data_dir": str(tmp_path)}], tmp_path, RunConfig().data
    )
    assert problems == ()
    assert written.train == plain.train


def test_presets_hold_and_say_only_what_differs(tmp_path: Path) -> None:
    for preset in form_schema.list_presets():
        tried = try_load_mapping(preset.config, tmp_path)
        assert tried.problems == ()
        assert not any("no effect" in note for note in tried.loaded.notices)
        assert all(value != all_options()[name].default for name, value in preset.config.items())
    assert [preset.id for preset in form_schema.list_presets()] == [
        "8gb",
        "12gb",
        "16gb",
        "24gb",
        "80gb",
        "nano",
    ]


def test_presets_take_the_finest_base_that_fits() -> None:
    found = {preset.id: preset for preset in form_schema.list_presets()}
    bases = [
        found[f"{gb}gb"].config.get("base_model_precision", "no_change")
        for gb in form_schema.PRESET_MEMORY_GB
    ]
    assert bases == ["nf4", "int8", "int8", "no_change", "no_change"]
    assert found["80gb"].config == {"gradient_checkpointing": False}
    for gb in form_schema.PRESET_MEMORY_GB:
        planned = found[f"{gb}gb"].planned_gb
        assert planned is not None
        assert planned < gb


def test_the_pages_have_a_name_for_every_section() -> None:
    words = (Path(__file__).parents[2] / "web/src/i18n/en/newRun.ts").read_text(encoding="utf-8")
    assert set(re.findall(r"^  group_(\w+):", words, re.MULTILINE)) == set(RunConfig.model_fields)


def test_a_lycoris_run_is_asked_for_lycoris_own() -> None:
    needs = {
        option.name: option.needs.get("lora_type")
        for option in form_schema.build_form_schema().options
    }
    assert needs["lycoris_config"] == ["lycoris"]
    assert needs["lora_rank"] == needs["use_dora"] == ["standard"]
    assert needs["flux_lora_target"] is None

"""The verdict is that of `train`; what the server adds is refused before anything is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.config.load import try_load_config
from simpletuner.server.config_validation import validate_config
from simpletuner.server.form_schema import NOT_SETTABLE
from simpletuner.server.schemas.configs import ConfigValidationResult
from simpletuner.server.workspace import Workspace

SETS = [{"id": "photos", "instance_data_dir": "pics"}]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "work" / "pics").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return Workspace((tmp_path / "work").resolve())


def said(verdict: ConfigValidationResult) -> dict[str, str]:
    assert len({problem.loc for problem in verdict.problems}) == len(verdict.problems)
    return {problem.loc: problem.message for problem in verdict.problems}


def test_what_holds_says_what_differs(workspace: Workspace) -> None:
    config = {"network_rank": 8, "seed": 42, "base_model_precision": "int8-quanto"}
    verdict = validate_config(workspace, config, SETS)
    assert verdict.problems == []
    assert verdict.changed == {"lora_rank": 8, "base_model_precision": "int8"}
    assert any("network_rank is read as lora_rank" in note for note in verdict.notes)


def test_all_problems_at_once_with_their_option(workspace: Workspace) -> None:
    config = {
        "learning_rat": 1,
        "network-rank": 0,
        "lr_scheduler": "cosine",
        "lr_end": 1,
        "seed": "x",
    }
    sets = [*SETS, {"id": "more", "instance_data_dir": "gone", "resolution": -1, "croop": 1}, 7]
    found = said(validate_config(workspace, config, sets))
    assert found["learning_rat"] == "unknown option; did you mean 'learning_rate'?"
    assert found["lora_rank"] == "lora_rank = 0: must be at least 1, at most 1024"
    assert found["lr_end"] == "1 is above learning_rate 0.0001"
    assert found["seed"] == 'seed = "x": must be a whole number'
    assert "does not exist" in found["more.instance_data_dir"]
    assert "at most 16384" in found["more.resolution"]
    assert found["more.croop"] == "unknown field; did you mean 'crop'?"
    assert "a dataset must be an object" in found["[2]"]
    assert len(found) == 8


@pytest.mark.parametrize(
    "config",
    [
        {"lora_rank": 0, "model_type": "full", "base_model_precision": "int8"},
        {"max_train_steps": 3, "num_train_epochs": 4, "resolution": 2},
        {"gradient_checkpointing": False, "musubi_blocks_to_swap": 3, "report_to": "pigeons"},
        {"push_to_hub": True, "loss_type": "l7", "tokenizer_max_length": 10**9},
    ],
)
def test_the_same_words_as_the_reader_of_files(
    workspace: Workspace, config: dict, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    (tmp_path / "multidatabackend.json").write_text("[]")
    by_file = [problem.message for problem in try_load_config((), path, environ={}).problems]
    ours = said(validate_config(workspace, config, SETS))
    assert ours
    assert sorted(ours.values()) == sorted(
        what.removeprefix(f"{next((name for name in ours if what.startswith(f'{name}: ')), '')}: ")
        for what in by_file
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"type": "aws", "aws_bucket_name": "b"}, "type"),
        ({"type": "csv", "table": "pics/t.csv"}, "table"),
        ({"type": "huggingface", "dataset_name": "a/b"}, "dataset_name"),
        ({"instance_data_dir": "s3://bucket/photos"}, "instance_data_dir"),
        ({"caption_strategy": "csv", "caption_table": "https://x/t.csv"}, "caption_table"),
        ({"caption_strategy": "csv", "parquet": {"path": "https://x/t.csv"}}, "parquet"),
    ],
)
def test_datasets_of_other_machines_are_not_settable(
    workspace: Workspace, fields: dict[str, object], name: str
) -> None:
    found = said(validate_config(workspace, {}, [{**SETS[0], **fields}]))
    assert "cannot be set here: it reads from other machines" in found[f"photos.{name}"]


def test_without_datasets_nothing_can_be_trained(workspace: Workspace) -> None:
    assert list(said(validate_config(workspace, {}, []))) == ["datasets"]


@pytest.mark.parametrize("name", NOT_SETTABLE)
def test_what_reaches_outside_is_not_settable(workspace: Workspace, name: str) -> None:
    (workspace.root / "x.json").write_text("{}")
    assert "cannot be set here" in said(validate_config(workspace, {name: "x.json"}, SETS))[name]
    spelt = f"--{name.replace('_', '-')}"
    assert "cannot be set here" in said(validate_config(workspace, {spelt: "x.json"}, SETS))[name]


@pytest.mark.parametrize(
    "written", ["/etc/passwd", "../outside", "~root", "link", "pics/../../outside", "a\0b"]
)
@pytest.mark.parametrize(
    "name", ["output_dir", "init_lora", "cache_dir", "pretrained_model_name_or_path"]
)
def test_paths_stay_inside(workspace: Workspace, name: str, written: str) -> None:
    (workspace.root / "link").symlink_to("../outside")
    message = said(validate_config(workspace, {name: written}, SETS))[name]
    assert "outside" in message or message == "this is not a valid path"
    message = said(validate_config(workspace, {}, [{"id": "a", "instance_data_dir": written}]))[
        "a.instance_data_dir"
    ]
    assert "outside" in message or message == "this is not a valid path"


@pytest.mark.parametrize("name", ["output_dir", "init_lora", "cache_dir", "resume_from_checkpoint"])
@pytest.mark.parametrize("number", [5, 5.0])
def test_a_number_is_no_path(
    workspace: Workspace, name: str, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of files takes it for a name, and would look where the server was started."""
    outside = workspace.root.parent / "outside"
    (outside / str(number)).mkdir()
    monkeypatch.chdir(outside)
    assert said(validate_config(workspace, {name: number}, SETS)) == {name: "must be text"}
    sets = [{**SETS[0], "id": "a", "instance_data_dir": number}]
    assert said(validate_config(workspace, {}, sets)) == {"a.instance_data_dir": "must be text"}


def test_what_lies_outside_is_not_told(workspace: Workspace) -> None:
    there, gone = (
        validate_config(
            workspace, {"init_lora": f"../{name}"}, [{"id": "a", "instance_data_dir": f"../{name}"}]
        )
        for name in ("outside", "nothing")
    )
    assert there == gone


def test_other_roots_and_repositories_are_allowed(workspace: Workspace, tmp_path: Path) -> None:
    roots = ((tmp_path / "outside").resolve(), (tmp_path / "elsewhere").resolve())
    wider = Workspace(workspace.root, roots)
    sets = [{"id": "a", "instance_data_dir": str(tmp_path / "outside")}]
    config = {
        "output_dir": str(tmp_path / "elsewhere" / "run"),
        "pretrained_model_name_or_path": "some/base",
    }
    assert validate_config(wider, config, sets).problems == []
    assert len(validate_config(workspace, config, sets).problems) == 2


def test_the_environment_is_never_read(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMPLETUNER_SEED", "77")
    monkeypatch.setenv("A_SECRET", "hunter2")
    config = {"tracker_run_name": "{env:A_SECRET}", "lora_target_modules": ["{env:A_SECRET}"]}
    sets = [
        {
            "id": "photos",
            "instance_data_dir": "{env:A_SECRET}",
            "instance_prompt": ["{env:A_SECRET}"],
        }
    ]
    verdict = validate_config(workspace, config, sets)
    assert "hunter2" not in verdict.model_dump_json()
    assert "77" not in verdict.model_dump_json()
    locs = [
        "tracker_run_name",
        "lora_target_modules",
        "photos.instance_data_dir",
        "photos.instance_prompt",
    ]
    assert [problem.loc for problem in verdict.problems] == locs


def test_training_in_fp16_is_refused_at_its_option(workspace: Workspace) -> None:
    assert (
        "training needs bf16"
        in said(validate_config(workspace, {"mixed_precision": "fp16"}, SETS))["mixed_precision"]
    )


def test_odd_values_are_complaints_not_failures(workspace: Workspace) -> None:
    odd = [None, [], {}, True, -1, 1e400, "", " ", "\ud800", [[]], {"a": 1}, "null"]
    for name in (
        "resolution",
        "lora_rank",
        "output_dir",
        "lora_target_modules",
        "",
        "model",
        "_metadata",
    ):
        for value in odd:
            validate_config(
                workspace,
                {name: value},
                [{"id": value, "instance_data_dir": value, name: value}, value],
            )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_target_modules", "a{99999999999}"),
        ("lora_target_modules", "(" * 20_000 + ")" * 20_000),
        ("validation_resolution", "9" * 5000),
        ("variant", "../../x"),
    ],
)
def test_what_python_cannot_hold_is_a_complaint(
    workspace: Workspace, name: str, value: str
) -> None:
    assert list(said(validate_config(workspace, {name: value}, SETS))) == [name]

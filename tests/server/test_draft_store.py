"""Drafts survive everything, are never lost to two writers, and read other people's files."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from simpletuner.config.load import resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.server.api_errors import ApiError
from simpletuner.server.config_validation import validate_config
from simpletuner.server.draft_store import DraftStore, parse_import
from simpletuner.server.schemas.configs import DraftWrite, ImportRequest
from simpletuner.server.trash import Trash
from simpletuner.server.workspace import Workspace

WORKSPACE = Workspace(Path("/nowhere"))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path.resolve())


def wanted(name: str = "fox", version: int | None = None, **config: object) -> DraftWrite:
    return DraftWrite(name=name, config=config, datasets=[{"id": "a"}], version=version)


@contextmanager
def refused(status: int) -> Iterator[None]:
    with pytest.raises(ApiError) as caught:
        yield
    assert caught.value.status == status


def test_a_draft_is_a_file_that_another_server_reads(workspace: Workspace) -> None:
    made = DraftStore(workspace).create(wanted(lora_rank=8))
    assert made.version == 1
    assert DraftStore(workspace).get(made.id) == made
    again = DraftStore(workspace).update(made.id, wanted("other", 1, lora_rank=4))
    assert (again.version, again.name, again.config) == (2, "other", {"lora_rank": 4})
    assert [draft.id for draft in DraftStore(workspace).list_drafts()] == [made.id]
    assert [path.name for path in (workspace.server_dir / "drafts").iterdir()] == [
        f"{made.id}.json"
    ]


def test_a_stale_version_changes_nothing(workspace: Workspace) -> None:
    drafts = DraftStore(workspace)
    made = drafts.create(wanted())
    now = drafts.update(made.id, wanted("second", 1))
    for version, status in ((1, 409), (3, 409), (None, 422)):
        with refused(status):
            drafts.update(made.id, wanted("third", version))
    assert drafts.get(made.id) == now


def test_of_many_writers_one_wins(workspace: Workspace) -> None:
    drafts = DraftStore(workspace)
    made = drafts.create(wanted())
    won: list[int] = []

    def write(number: int) -> None:
        try:
            drafts.update(made.id, wanted(f"n{number}", 1))
        except ApiError:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert drafts.get(made.id).name == f"n{won[0]}"


def test_what_is_removed_goes_to_the_trash(workspace: Workspace) -> None:
    drafts = DraftStore(workspace)
    made = drafts.create(wanted(seed=3))
    drafts.remove(made.id)
    assert drafts.list_drafts() == []
    [entry] = Trash(workspace).entries()
    with refused(404):
        drafts.remove(made.id)
    Trash(workspace).restore(entry.id)
    assert drafts.get(made.id).config == {"seed": 3}


@pytest.mark.parametrize(
    "id", ["", "x" * 12, "../../../etc", "0" * 13, "A" * 12, "0" * 12, "00000000000\n"]
)
def test_ids_that_are_none(workspace: Workspace, id: str) -> None:
    for act in (DraftStore(workspace).get, DraftStore(workspace).remove):
        with refused(404):
            act(id)


@pytest.mark.parametrize("name", ["", "  ", ".hidden", "a/b", "a\\b", "a\nb", "x" * 81])
def test_names_that_are_none(workspace: Workspace, name: str) -> None:
    with refused(422):
        DraftStore(workspace).create(wanted(name))


def test_a_damaged_file_does_not_hide_the_others(workspace: Workspace) -> None:
    drafts = DraftStore(workspace)
    made = drafts.create(wanted())
    (workspace.server_dir / "drafts" / "0123456789ab.json").write_text('{"id": ')
    assert [draft.id for draft in drafts.list_drafts()] == [made.id]
    with refused(404):
        drafts.get("0123456789ab")


def test_options_are_imported_under_their_own_names() -> None:
    text = """{
      // from another program
      "$schema": "x", "--network-rank": "32", "base_model_precision": "int8-quanto",
      "learning_rate": "2e-4",
      "seed": 42, "pretrained_model_name_or_path": null, "webhook_config": {"webhook_url": "http://x/secret"},
      "noise_offset": 0.1, "data_backend_config": "sets.json", "lora_ranc": 3,
      "max_train_steps": "many",
      "tracker_run_name": "{env:HOME}",
    }"""
    found = parse_import(ImportRequest(name="config.jsonc", text=text), WORKSPACE)
    kept = {
        "lora_rank": 32,
        "base_model_precision": "int8",
        "learning_rate": 2e-4,
        "max_train_steps": "many",
    }
    assert found.config == kept
    assert [problem.loc for problem in found.problems] == [
        "lora_ranc",
        "max_train_steps",
        "tracker_run_name",
    ]
    assert "secret" not in found.model_dump_json()
    assert len(found.notes) == 3


def test_toml_datasets_and_broken_files_are_told_apart() -> None:
    assert parse_import(ImportRequest(name="a.toml", text="seed = 7\n"), WORKSPACE).config == {
        "seed": 7
    }
    sets = parse_import(
        ImportRequest(name="multidatabackend.json", text='[{"id": "a"}, 3] // two'), WORKSPACE
    )
    assert sets.datasets == [{"id": "a"}]
    assert len(sets.problems) == 1
    wrapped = parse_import(
        ImportRequest(name="c.json", text='{"_metadata": {}, "config": {"seed": 7}}'),
        WORKSPACE,
    )
    assert wrapped.config == {"seed": 7}
    broken = parse_import(ImportRequest(name="../../config.json", text='{\n  "seed": }'), WORKSPACE)
    assert broken.config is None
    assert broken.problems[0].where == "config.json:2:11"
    for text in ("", "3", "null", '"x"'):
        assert parse_import(ImportRequest(name="x.json", text=text), WORKSPACE).problems


def test_a_run_is_copied_without_what_is_its_own(workspace: Workspace) -> None:
    run = workspace.output_dir / "fox"
    (workspace.root / "config" / "fox" / "pics").mkdir(parents=True)
    run.mkdir(parents=True)
    sets = workspace.root / "config" / "fox" / "multidatabackend.json"
    sets.write_text('[{"id": "pics", "instance_data_dir": "pics", "repeats": 2}]')
    flat = resolved_options(RunConfig()) | {
        "lora_rank": 4,
        "output_dir": str(run),
        "resume_from_checkpoint": "must",
        "seed": 9,
        "data_backend_config": str(sets),
        "webhook_config": {"webhook_url": "***"},
        "max_train_steps": 30,
    }
    (run / "config.json").write_text(json.dumps(flat))
    draft = DraftStore(workspace).create_from_run(run)
    assert draft.config == {"lora_rank": 4, "seed": 9, "max_train_steps": 30}
    pictures = str(workspace.root / "config" / "fox" / "pics")
    assert draft.datasets == [{"id": "pics", "instance_data_dir": pictures, "repeats": 2}]
    assert validate_config(workspace, draft.config, draft.datasets).problems == []
    (run / "config.json").write_text(json.dumps(flat | {"data_backend_config": "/etc/passwd"}))
    assert DraftStore(workspace).create_from_run(run).datasets == []
    (run / "config.json").write_text("{")
    with refused(404):
        DraftStore(workspace).create_from_run(run)


@pytest.mark.parametrize("text", ["a = " + "[" * 20_000, "a = " + "9" * 5000])
def test_an_import_beyond_all_bounds_is_a_complaint(text: str) -> None:
    assert parse_import(ImportRequest(name="config.toml", text=text), WORKSPACE).problems


def test_an_output_dir_elsewhere_becomes_a_folder_of_the_workspace(workspace: Workspace) -> None:
    """The configuration of the quickstart imports and starts as it is."""
    guide = Path(__file__).parents[2] / "docs" / "quickstart" / "README.md"
    text = guide.read_text(encoding="utf-8").partition("```jsonc\n")[2].partition("```")[0]
    assert '"output_dir": "/workspace/chroma-output"' in text
    found = parse_import(ImportRequest(name="config.json", text=text), workspace)
    assert found.problems == []
    assert found.config is not None
    assert found.config["output_dir"] == "output/chroma-output"
    assert any("/workspace/chroma-output is outside" in note for note in found.notes)
    workspace.datasets_dir.mkdir()
    datasets = [{"id": "a", "instance_data_dir": str(workspace.datasets_dir)}]
    problems = validate_config(workspace, found.config, datasets).problems
    assert [one for one in problems if one.loc == "output_dir"] == []


def test_prompts_are_kept_and_their_names_are_unique(workspace: Workspace) -> None:
    entry = {"name": "red", "prompt": "a red zorbo", "seed": 3}
    made = DraftStore(workspace).create(
        DraftWrite(name="fox", config={}, datasets=[], prompts=[entry])
    )
    assert DraftStore(workspace).get(made.id).prompts[0].seed == 3
    with pytest.raises(ValueError, match="same name"):
        DraftWrite(name="a", config={}, datasets=[], prompts=[entry, {**entry, "name": "RED"}])

"""A run owns its folder and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.config.output_folder import (
    RUN_MARKER,
    find_output_dir_problems,
    foreign_entries,
    is_run_folder,
)

EVENT = '{"t": 1.0, "kind": "run_started"}\n'


def problems(output_dir: Path, **given: object) -> str:
    return "\n".join(find_output_dir_problems(output_dir, given.pop("datasets", {}), **given))


@pytest.mark.parametrize("kind", ["marker", "events", "checkpoint"])
def test_a_folder_of_a_run_is_recognized_with_and_without_its_marker(
    tmp_path: Path, kind: str
) -> None:
    if kind == "marker":
        (tmp_path / RUN_MARKER).write_text("{}")
    elif kind == "events":
        (tmp_path / "events.jsonl").write_text(EVENT)
    else:
        (tmp_path / "checkpoint-5").mkdir()
        manifest = json.dumps({"files": {"state.json": {"bytes": 1, "sha256": ""}}})
        (tmp_path / "checkpoint-5" / "manifest.json").write_text(manifest)
    (tmp_path / "added-later.txt").touch()
    assert is_run_folder(tmp_path)
    assert problems(tmp_path, config_path=tmp_path / "config.json") == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", ""),
        ("config.json", "{}"),
        ("events.jsonl", "not ours"),
        ("events.jsonl", '{"event": 1}'),
        ("train.log", ""),
        ("checkpoint-5/manifest.json", "{}"),
        ("checkpoint-5/manifest.json", "[" * 100_000),
        ("pytorch_lora_weights.safetensors", ""),
    ],
)
def test_a_folder_of_the_user_is_refused_with_its_files_and_the_ways_out(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    (tmp_path / "run").mkdir()
    said = problems(tmp_path)
    assert name.split("/")[0] in said
    assert f"for example {tmp_path / 'run-2'}" in said


@pytest.mark.parametrize("entries", [(), (".hidden", ".DS_Store"), ("lost+found",)])
def test_an_empty_folder_is_free(tmp_path: Path, entries: tuple[str, ...]) -> None:
    for name in entries:
        (tmp_path / name).mkdir()
    assert foreign_entries(tmp_path) == []
    assert problems(tmp_path) == ""
    assert problems(tmp_path / "not there yet") == ""


def test_a_dataset_and_a_run_never_contain_each_other(tmp_path: Path) -> None:
    data = tmp_path / "data" / "moons"
    data.mkdir(parents=True)
    (tmp_path / "link").symlink_to(data)
    for output_dir, said in (
        (data, "contains the images of the dataset moons"),
        (tmp_path / "data", "contains the images"),
        (tmp_path, "contains the images"),
        (data / "run", "is inside the dataset moons"),
        (tmp_path / "link" / "a" / "b", "is inside the dataset moons"),
    ):
        assert said in problems(output_dir, datasets={"moons": data})
    assert problems(tmp_path / "data" / "moons-run", datasets={"moons": data}) == ""
    (data / "run").mkdir()
    (data / "run" / "events.jsonl").write_text(EVENT)
    assert "is inside" in problems(data / "run", datasets={"moons": data}), "also an earlier run"


def test_the_folder_of_the_configuration_and_of_a_shared_cache_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config" / "config.json"
    config.parent.mkdir()
    config.write_text("{}")
    assert "contains the configuration" in problems(config.parent, config_path=config)
    assert "contains the configuration" in problems(tmp_path, config_path=config)
    assert problems(config.parent / "run", config_path=config) == ""
    cache = tmp_path / "shared" / "cache-of-all"
    assert "contains the cache folder" in problems(cache, caches=[cache])
    assert "contains the cache folder" in problems(tmp_path / "shared", caches=[cache])
    assert problems(tmp_path / "run", caches=[tmp_path / "run" / "cache", cache]) == ""

"""Addresses of caches are checked before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from simpletuner.cli.checked_config import require_config_and_datasets
from simpletuner.config.load import try_load_config
from simpletuner.errors import ConfigError


def problems(folder: Path, **options: str) -> list[str]:
    (folder / "photos").mkdir(exist_ok=True)
    (folder / "multidatabackend.json").write_text('[{"id": "p", "instance_data_dir": "photos"}]')
    (folder / "config.json").write_text(json.dumps({"output_dir": "out", **options}, indent=1))
    with pytest.raises(ConfigError) as caught:
        require_config_and_datasets(try_load_config((), folder / "config.json", cwd=folder))
    return [str(problem) for problem in caught.value.problems]


def test_a_cache_is_on_this_machine(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, cache_dir="s3://mine/cache")
    assert problem == (
        "config.json:3:2: cache_dir: caches are files of this machine; cache_remote is for an address"
    )


@pytest.mark.parametrize("address", ["mine/cache", "ftp://mine", "s3://", "https://mine/cache"])
def test_copies_need_the_address_of_a_store(address: str, tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, cache_remote=address)
    assert f'cache_remote = "{address}": must be an address such as s3://' in problem


def test_a_missing_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        return None if name == "gcsfs" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    (problem,) = problems(tmp_path, cache_remote="gcs://mine/cache")
    assert problem.endswith("gs:// needs: pip install 'simpletuner[gcs]'")

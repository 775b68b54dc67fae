"""Variables that are set for the libraries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simpletuner.config.environment import set_compiled_code_dir

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, "a path of the user's")


def test_compiled_kernels_lie_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_compiled_code_dir()
    assert os.environ[VARIABLE] == "a path of the user's"
    monkeypatch.delenv(VARIABLE)
    set_compiled_code_dir()
    assert os.environ[VARIABLE] == str(tmp_path / "cache" / "simpletuner" / "compiled")
    assert list(tmp_path.iterdir()) == [], "a folder is made only where something is compiled"


@pytest.mark.parametrize("home", ["unwritable", "none"])
def test_without_a_cache_torch_keeps_its_own_place(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch fails to be imported where it cannot make the folder."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(VARIABLE)
    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    set_compiled_code_dir()
    assert VARIABLE not in os.environ

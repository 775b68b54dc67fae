"""The accelerator extras and their constraints: one CUDA generation each, and one fitting set."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("cpu", "cuda", "cuda13")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The CUDA that each release of torch requires, by the metadata of its wheel for Linux on PyPI.
TORCH_CUDA = {
    "2.10.0": "12.8",
    "2.11.0": "13.0",
    "2.12.0": "13.0",
    "2.12.1": "13.0",
    "2.13.0": "13.0",
    "2.14.0": "13.0",
    "2.14.1": "13.0",
    "2.15.0": "13.2",
}


def torch_range(extra: str) -> SpecifierSet:
    (requirement,) = map(Requirement, PROJECT["optional-dependencies"][extra])
    assert requirement.name == "torch"
    return requirement.specifier


def constraints(extra: str, python: str) -> dict[str, Version]:
    """Return the versions that the file of `extra` names for one Python, by package name."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints" / f"{extra}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        constraint = Requirement(line)
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        if constraint.marker is not None and not constraint.marker.evaluate(environment):
            continue
        (pin,) = constraint.specifier
        assert pin.operator == "=="
        name = canonicalize_name(constraint.name)
        assert name not in found, f"{extra}.txt names {name} twice for Python {python}"
        found[name] = Version(pin.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_the_set_fits_the_package_and_its_extra(extra: str, python: str) -> None:
    pins = constraints(extra, python)
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name in pins, f"{extra}.txt does not name {name}"
            assert pins[name] in requirement.specifier, f"{name}=={pins[name]}: {requirement}"


@pytest.mark.parametrize("python", PYTHONS)
def test_each_set_holds_one_generation_of_cuda(python: str) -> None:
    cpu, cuda, cuda13 = (constraints(extra, python) for extra in EXTRAS)
    assert cuda["nvidia-cuda-runtime-cu12"].release[:2] == (12, 8)
    assert cuda13["nvidia-cuda-runtime"].release[:2] == (13, 0)
    for pins, other in ((cuda, "cu13"), (cuda13, "cu12"), (cpu, "cu12"), (cpu, "cu13")):
        assert not [name for name in pins if name.endswith(f"-{other}")]
    assert not [name for name in cpu if re.match(r"nvidia-|cuda-|triton$", name)]
    assert "nvidia-cuda-runtime" not in cuda


def test_each_extra_admits_one_generation_of_cuda() -> None:
    generations = {
        extra: {
            cuda.split(".")[0] for torch, cuda in TORCH_CUDA.items() if torch in torch_range(extra)
        }
        for extra in ("cuda", "cuda13")
    }
    assert generations == {"cuda": {"12"}, "cuda13": {"13"}}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_cuda_of_each_set_is_the_one_of_its_torch(extra: str) -> None:
    pins = constraints(extra, "3.12")
    for name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        if name in pins:
            found = ".".join(map(str, pins[name].release[:2]))
            assert found == TORCH_CUDA[str(pins["torch"])]


def test_a_package_named_twice_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "constraints").mkdir()
    text = "# head\na==1; python_version < '3.11'\na==2; python_version >= '3.11'\n"
    (tmp_path / "constraints" / "cpu.txt").write_text(text)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert constraints("cpu", "3.10") == {"a": Version("1")}
    assert constraints("cpu", "3.13") == {"a": Version("2")}
    (tmp_path / "constraints" / "cpu.txt").write_text(text + "A==2\n")
    with pytest.raises(AssertionError, match="twice"):
        constraints("cpu", "3.13")

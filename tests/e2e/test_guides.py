"""The guides in docs/: every command in a `bash` block runs, on the bundled small model."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.test_quickstart import PATIENCE_S, SMALL, serves
from tests.e2e.training_project import make_images
from tests.models.tiny_evaluation_models import make_clip

DOCS = Path(__file__).parents[2] / "docs"
# The tutorial makes the run that the others use.
OTHER_GUIDES = (
    "install",
    "web-tutorial",
    "datasets",
    "chroma",
    "memory",
    "lora-files",
    "validation",
    "metrics",
    "rollout",
    "preservation",
    "troubleshooting",
)


def commands(guide: str) -> list[str]:
    """Return the lines of the guide's `bash` blocks without their comments."""
    text = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r" *#.*", "", line) for block in blocks for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guides")
    make_images(path / "pictures", 3)
    Image.new("L", (64, 64), 255).save(path / "mask.png")
    make_clip(path / "clip")
    return path


@pytest.fixture(scope="module")
def environ(folder: Path, warm_commands: Path) -> dict[str, str]:
    names = {f"SIMPLETUNER_{name.upper()}": value for name, value in SMALL.items()}
    home = {"HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "home" / "cache")}
    path = os.pathsep.join([str(warm_commands), os.environ["PATH"]])
    return {**os.environ, **names, **home, "PATH": path, "OMP_NUM_THREADS": "1"}


def test_every_guide_is_tested() -> None:
    with_commands = {
        path.stem for path in DOCS.glob("*.md") if "```bash" in path.read_text("utf-8")
    }
    assert with_commands <= {"tutorial", "choosing-a-rate", *OTHER_GUIDES}


def run_commands(guide: str, folder: Path, environ: dict[str, str]) -> None:
    assert commands(guide)
    for line in commands(guide):
        assert line.startswith("simpletuner "), line
        if line == "simpletuner server":
            serves(folder, environ)
            continue
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def after_tutorial(folder: Path, environ: dict[str, str]) -> Path:
    """The folder with the run of the tutorial, in whatever order the tests run."""
    run_commands("tutorial", folder, environ)
    return folder


@pytest.mark.timeout(600)
def test_the_commands_of_the_tutorial_run(after_tutorial: Path) -> None:
    assert (after_tutorial / "output" / "pictures" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "guide", [*OTHER_GUIDES, pytest.param("choosing-a-rate", marks=pytest.mark.slow)]
)
def test_the_commands_run(guide: str, after_tutorial: Path, environ: dict[str, str]) -> None:
    run_commands(guide, after_tutorial, environ)

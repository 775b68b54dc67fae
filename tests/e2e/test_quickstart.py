"""docs/quickstart in three languages: what it says to type is typed here, what it names is there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from simpletuner.config.load import try_load_mapping
from simpletuner.config.option_catalog import all_options, option_aliases
from tests.e2e.training_project import make_images

ROOT = Path(__file__).parents[2]
PAGES = {"en": "README.md", "es": "es.md", "hi": "hi.md"}
PATIENCE_S = 280
# The bundled model in place of 8.9 billion weights, and two steps of it.
SMALL = {
    "model_flavour": "nano", "resolution": "64", "resolution_type": "pixel", "max_train_steps": "2",
    "validation_num_inference_steps": "2", "validation_resolution": "64", "torch_num_threads": "1",
}  # fmt: skip


def text(language: str) -> str:
    return (ROOT / "docs" / "quickstart" / PAGES[language]).read_text(encoding="utf-8")


def blocks(language: str, kind: str) -> list[str]:
    """Without what follows a #, which is for people."""
    found = re.findall(rf"^```{kind}\n(.*?)^```$", text(language), re.MULTILINE | re.DOTALL)
    return [re.sub(r" *#.*", "", block) for block in found]


@pytest.mark.parametrize("language", ["es", "hi"])
@pytest.mark.parametrize("kind", ["bash", "sh", "jsonc"])
def test_every_language_holds_the_same_commands(language: str, kind: str) -> None:
    assert blocks("en", kind)
    assert blocks(language, kind) == blocks("en", kind)


@pytest.mark.parametrize("language", PAGES)
def test_every_option_is_there(language: str) -> None:
    named = set(re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)`", text(language)))
    assert len(named) > 10
    assert {
        name for name in named if name not in all_options() and name not in option_aliases()
    } == set()
    assert set(re.findall(r"--set (\w+)=", text(language))) <= set(all_options())


@pytest.mark.parametrize("language", PAGES)
def test_every_button_has_that_name_on_the_pages(language: str) -> None:
    named = re.findall(r"(?<!\*)\*(?!\*)([^*]+)(?<!\*)\*(?!\*)", text(language))
    assert len(named) >= 4
    source = ROOT / "web" / "src" / "i18n" / language
    words = "\n".join(file.read_text(encoding="utf-8") for file in source.glob("*.ts"))
    for name in named:
        assert f'"{" ".join(name.split())}"' in words, name


def test_the_configuration_on_the_page_holds() -> None:
    (block,) = blocks("en", "jsonc")
    tried = try_load_mapping(json.loads(block), Path("/"))
    assert tried.loaded is not None, tried.problems


def test_every_command_runs(tmp_path: Path, warm_commands: Path) -> None:
    """In order, in one folder with a few pictures; the server is asked for its page and ended."""
    make_images(tmp_path / "pictures", 3)
    environ = {
        **os.environ,
        **{f"SIMPLETUNER_{name.upper()}": value for name, value in SMALL.items()},
    }
    environ |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}
    environ["PATH"] = os.pathsep.join([str(warm_commands), environ["PATH"]])
    lines = [line for block in blocks("en", "bash") for line in block.splitlines() if line]
    assert [line for line in lines if line.startswith("simpletuner ")] == lines[1:]
    for line in lines:
        if line == "simpletuner server":
            serves(tmp_path, environ)
            continue
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert (tmp_path / "output" / "pictures" / "pytorch_lora_weights.safetensors").is_file()


def serves(folder: Path, environ: dict[str, str]) -> None:
    words = [str(Path(sys.executable).parent / "simpletuner"), "server", "--port", "0"]
    with subprocess.Popen(
        words, cwd=folder, env=environ, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        try:
            with urllib.request.urlopen(address + "api/v1/system", timeout=PATIENCE_S) as answer:
                assert json.loads(answer.read())["workspace"] == str(folder)
        finally:
            process.send_signal(signal.SIGINT)
            told = process.communicate(timeout=PATIENCE_S)[0]
    assert "Running trainings continue" in told

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.cli import COMMANDS
from tests.quick import assert_quick, children_s

# an import of any of these is a mistake that shows at once
BLOCKED_START = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any((name + ".").startswith(other + ".") for other in {blocked!r}):
            raise AssertionError("imported " + name)
sys.meta_path.insert(0, Blocked())
sys.argv[0] = "simpletuner"
from simpletuner.cli import main
main()
"""
HEAVY = ("torch", "diffusers", "transformers", "peft", "numpy", "PIL")
# What only a training needs, or a configuration that asks for it.
UNASKED = (
    *HEAVY,
    "asyncio",
    "concurrent",
    "http",
    "sqlite3",
    "ssl",
    "yaml",
    "simpletuner.events.event_types",
)


def run(cwd: Path, *words: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Return the finished command."""
    environ = {
        key: value for key, value in os.environ.items() if not key.startswith("SIMPLETUNER_")
    }
    start = ["-c", BLOCKED_START.format(blocked=blocked)] if blocked else ["-m", "simpletuner"]
    return subprocess.run(
        [sys.executable, *start, *words], cwd=cwd, capture_output=True, text=True, env=environ
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "a.png")
    (pictures / "a.txt").write_text("a black square")
    sets = [{"id": "one", "type": "local", "instance_data_dir": "pictures"}]
    (tmp_path / "multidatabackend.json").write_text(json.dumps(sets))
    (tmp_path / "config.json").write_text('{\n  // first\n  "seed": 7\n}')
    return tmp_path


@pytest.mark.parametrize("words", [(), ("--help",), ("--version",)])
def test_root_is_quick_and_light(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(tmp_path, *words, blocked=(*HEAVY, "pydantic", "rich"))
    assert "simpletuner" in done.stdout + done.stderr, done.stderr
    assert "imported" not in done.stderr
    assert_quick(lambda: run(tmp_path, *words), 0.3, children_s)


def test_root_help_names_every_command(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    for name, (_, text) in COMMANDS.items():
        assert name in done.stdout
        assert text in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_without_torch(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, name, "--help", blocked=("torch", "diffusers", "transformers"))
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_train_help_and_help_all(tmp_path: Path) -> None:
    ours = ("data", "events", "validation", "training", "config.load", "config.constraints")
    unneeded = (*UNASKED, "regex", *(f"simpletuner.{name}" for name in ours))
    assert run(tmp_path, "train", "--help", blocked=unneeded).returncode == 0
    helps = list[subprocess.CompletedProcess[str]]()
    assert_quick(lambda: helps.append(run(tmp_path, "train", "--help")), 0.5, children_s)
    basic, everything = helps[0], run(tmp_path, "train", "--help-all")
    assert "--learning_rate" in basic.stdout
    assert "--huber_c" not in basic.stdout
    assert "--huber_c" in everything.stdout


def test_mistakes_are_told_before_torch_and_in_a_second(project: Path) -> None:
    (project / "config.json").write_text('{\n  "learning_rat": 1,\n  "lora_rank": 0\n}')
    sets = [{"id": "one", "type": "local", "instance_data_dir": "gone"}]
    (project / "multidatabackend.json").write_text(json.dumps(sets))
    done = run(project, "train", "--sed", "3", blocked=UNASKED)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert lines[:3] == [
        "config.json:2:3: learning_rat: unknown option; did you mean 'learning_rate'?",
        "config.json:3:3: lora_rank = 0: must be at least 1, at most 1024",
        "--sed: unknown option; did you mean 'seed'?",
    ]
    assert lines[3].startswith("multidatabackend.json:1:")
    assert '"gone" does not exist' in lines[3]
    assert done.stdout == ""
    assert_quick(lambda: run(project, "train", "--sed", "3"), 0.6, children_s)


def test_prompt_library_and_webhooks_are_checked_too(project: Path) -> None:
    (project / "prompts.json").write_text('{"a": 3}')
    done = run(project, "train", "user_prompt_library=prompts.json", blocked=("torch",))
    assert done.returncode == 2
    assert "prompts.json:1:2" in done.stderr
    done = run(project, "train", 'webhook_config={"webhook_type": "pigeon"}', blocked=("torch",))
    assert done.returncode == 2
    assert "pigeon" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fit=8XB"], "use for example 12GB"),
        (["--fit", "--show-config"], "simpletuner plan --fit"),
    ],
)
def test_a_fit_that_cannot_be_is_told_before_torch(
    project: Path, words: list[str], told: str
) -> None:
    done = run(project, "train", *words, "--output_dir=out", blocked=("torch",))
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert not (project / "out").exists()


def test_show_config(project: Path) -> None:
    done = run(
        project,
        "train",
        "--show-config",
        "--lora-rank",
        "4",
        "learning_rate=2e-4",
        blocked=("torch",),
    )
    assert done.returncode == 0, done.stderr
    rows = {
        words[0]: words[1:] for line in done.stdout.splitlines() if len(words := line.split()) == 3
    }
    assert rows["seed"] == ["7", "config.json:3:3"]
    assert rows["lora_rank"] == ["4", "--lora_rank"]
    assert rows["learning_rate"] == ["0.0002", "--learning_rate"]
    assert rows["lora_dropout"] == ["0.0", "default"]
    assert (
        "note: neither max_train_steps nor num_train_epochs is given: training 1000 steps"
        in done.stdout
    )


def test_show_config_shows_the_notices_about_datasets(project: Path) -> None:
    file = project / "multidatabackend.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps([{**entries[0], "hash_filenames": True, "crop_aspect": "closest"}]))
    done = run(project, "train", "--show-config", blocked=("torch",))
    assert done.returncode == 0, done.stderr
    name = entries[0]["id"]
    assert f"note: {name}.hash_filenames is not needed: " in done.stdout
    assert (
        f"note: {name}.crop_aspect has no effect with crop false: it needs crop true" in done.stdout
    )


def test_nothing_to_train(tmp_path: Path) -> None:
    done = run(tmp_path, "train", blocked=("torch",))
    assert done.returncode == 2
    assert done.stderr.startswith("no configuration: none of config.json, ")
    assert done.stderr.count("\n") == 1
    done = run(tmp_path, "train", "--config", blocked=("torch",))
    assert done.stderr == "--config: needs a value\n"


def test_unknown_command(tmp_path: Path) -> None:
    done = run(tmp_path, "trian")
    assert done.returncode == 2
    assert "did you mean 'train'?" in done.stderr


def test_examples_are_copied_and_never_overwrite(tmp_path: Path) -> None:
    done = run(tmp_path, "examples", "list")
    assert "chroma.peft-lora" in done.stdout.split()
    done = run(tmp_path, "examples", "copy", "chroma.peft-lora", "--dest", "mine")
    assert done.returncode == 0
    config = tmp_path / "mine" / "config.json"
    assert config.is_file()
    (tmp_path / "mine" / "multidatabackend.json").unlink()
    config.write_text("my own")
    done = run(tmp_path, "examples", "copy", "chroma.peft-lora", "--dest", "mine")
    assert done.returncode == 2
    assert config.read_text() == "my own"
    assert not (tmp_path / "mine" / "multidatabackend.json").exists()
    done = run(tmp_path, "examples", "copy", "chroma")
    assert done.returncode == 2
    assert "chroma.peft-lora" in done.stderr


def test_the_preset_for_the_real_model_holds(tmp_path: Path) -> None:
    (tmp_path / "datasets" / "photos").mkdir(parents=True)
    words = ("train", "--example", "chroma.peft-lora", "--show-config")
    done = run(tmp_path, *words, blocked=("torch",))
    assert done.returncode == 0, done.stderr


def test_options_are_searched(tmp_path: Path) -> None:
    done = run(tmp_path, "options", "network-rank")
    assert done.stdout.startswith("lora_rank\n")
    done = run(tmp_path, "options", "ramtorch")
    assert "is not used: musubi_blocks_to_swap" in done.stdout
    done = run(tmp_path, "options")
    assert "learning_rate" in done.stdout.split()
    done = run(tmp_path, "options", "qqq")
    assert done.returncode == 2


def test_report_of_no_run(tmp_path: Path) -> None:
    done = run(tmp_path, "report", ".")
    assert done.returncode == 2
    assert "not a run folder" in done.stderr


def test_training_in_fp16_is_refused_with_the_reason(project: Path) -> None:
    done = run(project, "train", "--mixed_precision=fp16", blocked=("torch",))
    assert done.returncode == 2
    assert "--mixed_precision" in done.stderr
    assert "small gradients" in done.stderr

"""configure leaves a configuration that `train` takes: by pipe, by flags, on a terminal, new or
edited.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from simpletuner.cli.configure import command
from simpletuner.config.presets import MEMORY_PRESETS, NANO_PRESET
from simpletuner.server.schemas.base import ErrorDetail
from simpletuner.server.schemas.system import DeviceInfo
from tests.inside import inside
from tests.quick import assert_quick, children_s

ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("SIMPLETUNER_")}
START = [sys.executable, "-m", "simpletuner"]
CPU = DeviceInfo(name="CPU", kind="cpu", memory_total_bytes=8 << 30, memory_free_bytes=None)


class NoPlan:
    """A plan that is never ready. made: of every one, what it was to plan."""

    made: list[tuple[dict[str, Any], list[str]]]
    gb: float | None = None

    def __init__(self, config: dict[str, Any], words: list[str], cwd: Path) -> None:
        self.made.append((config, words))
        self.ended = False

    def has_ended(self, patience_s: float = 0.0) -> bool:
        assert patience_s <= 3
        return self.gb is not None

    def result(self) -> tuple[dict[str, Any] | None, list[ErrorDetail]]:
        return {"peak": (self.gb or 0) * 1e9}, []

    def terminate(self) -> None:
        self.ended = True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, size in enumerate([(256, 256), (256, 128), (128, 128)]):
        Image.new("RGB", size, (number, 0, 0)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"picture {number}")
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("SIMPLETUNER_"):
            monkeypatch.delenv(name)
    return tmp_path


@contextmanager
def machine(
    monkeypatch: pytest.MonkeyPatch, gb: int | None, planned: float | None = None
) -> Iterator[type]:
    """A machine with one card, or none."""
    card = DeviceInfo(
        name="Card", kind="cuda", memory_total_bytes=(gb or 0) << 30, memory_free_bytes=None
    )
    monkeypatch.setattr("simpletuner.server.hardware.list_devices", lambda: [card if gb else CPU])
    fake = type("Fake", (NoPlan,), {"made": [], "gb": planned})
    monkeypatch.setattr("simpletuner.server.plan_service.PlanProcess", fake)
    yield fake


def talk(*words: str, answers: str = "") -> Result:
    return CliRunner().invoke(command, words, input=answers)


def written(where: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    names = ("config.json", "multidatabackend.json")
    config, sets = (json.loads((where / name).read_text()) for name in names)
    return config, sets


def shown(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return inside(cwd, "train", *words, "--show-config")


def test_defaults_train_the_bundled_model_where_no_card_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(monkeypatch, None) as planner:
        done = talk("--defaults")
    assert done.exit_code == 0, done.output
    assert planner.made == []  # nobody waits, nothing is planned
    config, sets = written(folder)
    assert config == {
        **NANO_PRESET,
        "output_dir": "output/pictures",
        "validation_prompt": "picture 0",
    }
    assert '"resolution": 128,' in (folder / "config.json").read_text()
    assert sets == [{"id": "pictures", "type": "local", "instance_data_dir": "pictures"}]
    assert "3 images, 3 with captions, from 128x128 to 256x256 px" in done.output
    assert "simpletuner train\n" in done.output
    check = shown(folder)
    assert check.returncode == 0, check.stderr


@pytest.mark.timeout(600)
def test_a_real_process_through_a_pipe(folder: Path) -> None:
    answers = [
        "?",
        "nowhere",
        "pictures",
        "<",
        "",
        "lora",
        "0",
        "4",
        "nano",
        "128",
        "",
        "",
        "7",
        "",
        "none",
        "out",
    ]
    done = subprocess.run(
        [*START, "configure", "--env", "fox"], input="\n".join([*answers, ""]), cwd=folder, env=ENVIRON,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    config, sets = written(folder / "config" / "fox")
    assert config["lora_rank"] == 4
    assert config["max_train_steps"] == 7
    assert config["output_dir"] == "out"
    assert "validation_prompt" not in config
    assert sets[0]["instance_data_dir"] == str(folder.resolve() / "pictures")
    assert "nowhere is not a folder" in done.stdout
    assert "must be at least 1" in done.stdout
    assert "simpletuner train --env fox\n" in done.stdout
    assert shown(folder, "--env", "fox").returncode == 0


def test_the_input_ends_too_early(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine(monkeypatch, None):
        done = talk(answers="pictures\nlora\n")
    assert done.exit_code == 2
    assert "--defaults" in done.output
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize(
    ("gb", "row"), [(80, 0), (24, 1), (16, 3), (12, 3), (10, 5), (8, 5), (7, 6)]
)
def test_what_is_proposed_for_a_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gb: int, row: int
) -> None:
    with machine(monkeypatch, gb):
        assert talk("--defaults").exit_code == 0
    config, _ = written(folder)
    expected = {
        name: value for name, value in MEMORY_PRESETS[row][0].items() if value != "no_change"
    }
    how = ("precision", "backend", "device", "gradient_checkpointing")
    got = {name: value for name, value in config.items() if name.endswith(how)}
    assert got == expected
    assert "model_flavour" not in config


def test_the_table_is_named_until_the_plan_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(monkeypatch, 16) as planner:
        done = talk(answers="pictures\n" + "\n" * 12)
    assert done.exit_code == 0, done.output
    assert "The memory estimate is not ready; the preset needs 12.0 GB with int8" in done.output
    assert "Found Card, 17.2 GB." in done.output
    assert planner.made[-1][1] == ["--device", "cuda"]
    assert planner.made[-1][0]["base_model_precision"] == "int8"
    assert len(planner.made) < 4  # the same question is not planned anew


def test_a_plan_that_needs_more_proposes_less(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(monkeypatch, 16, planned=17.5):
        done = talk(answers="pictures\n" + "\n" * 12)
    assert "Estimated memory" in done.output
    config, _ = written(folder)
    assert config["base_model_precision"] == "int8"
    assert config["gradient_checkpointing_backend"] == "offload"


def test_settled_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--defaults", "--set", "network-rank=8", "--set", "seed=7", "--set", "model_type=LoRA"]
    with machine(monkeypatch, None):
        assert talk(*words, "--set", "instance_data_dir=pictures", "--output", "sub").exit_code == 0
        config, _ = written(folder / "sub")
        assert (config["lora_rank"], config["seed"], config["output_dir"]) == (8, 7, "output/sub")
        for wrong in ("lora_ranc=8", "seed", "seed=many"):
            done = talk("--defaults", "--set", wrong, "--output", "other")
            assert done.exit_code != 0
            assert not (folder / "other").exists()


def test_full_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine(monkeypatch, 80):
        assert talk("--defaults", "--set", "model_type=full").exit_code == 0
    config, _ = written(folder)
    assert (config["optimizer"], config["learning_rate"]) == ("adamw_bf16", 1e-5)
    assert "base_model_precision" not in config


def test_missing_captions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "pictures" / "1.txt").unlink()
    with machine(monkeypatch, None):
        assert talk("--defaults", "--output", "some").exit_code == 0
        for text in (folder / "pictures").glob("*.txt"):
            text.unlink()
        assert talk("--defaults", "--output", "none").exit_code == 0
        done = talk("--output", "asked", answers="pictures\ninstanceprompt\na zorbo\n" + "\n" * 12)
    assert done.exit_code == 0, done.output
    assert written(folder / "some")[0]["missing_caption"] == "drop"
    assert written(folder / "none")[0]["instance_prompt"] == "pictures"
    assert written(folder / "asked")[0]["instance_prompt"] == "a zorbo"
    for name in ("some", "none", "asked"):
        assert shown(folder, "--config", name).returncode == 0


def test_an_existing_configuration_is_edited_only_on_demand(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "more").mkdir()
    own = '{\n// mine\n"network_rank": 32, "huber_c": 0.3, "report_to": "{env:TRACKER}", "max_train_steps": 50}'  # noqa: E501
    sets = [
        {"id": "kept", "instance_data_dir": "pictures", "repeats": 3, "resolution": 256},
        {"id": "held", "dataset_type": "eval", "instance_data_dir": "more"},
    ]
    monkeypatch.setenv("TRACKER", "none")
    (folder / "config.json").write_text(own)
    (folder / "multidatabackend.json").write_text(json.dumps(sets))
    with machine(monkeypatch, None):
        for words in ((), ("--defaults",)):
            done = talk(*words, answers="\n" * 20)
            assert done.exit_code != 0
            assert "add --force" in str(done.exception) + done.output
            assert (folder / "config.json").read_text() == own
        assert talk("--defaults", "--force", "--set", "seed=3").exit_code == 0
        config, now = written(folder)
        assert config == {
            "lora_rank": 32, "huber_c": 0.3, "report_to": "{env:TRACKER}", "max_train_steps": 50, "seed": 3,
            "resolution": 256,
        }  # fmt: skip
        assert now == [{"id": "kept", "instance_data_dir": "pictures", "repeats": 3}, sets[1]]
        assert talk("--defaults", "--force").exit_code == 0
    assert written(folder) == (config, now)


def test_toml_is_not_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "config.toml").write_text("seed = 3\n")
    with machine(monkeypatch, None):
        done = talk("--defaults")
    assert "TOML" in str(done.exception)
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "pictures"]


def test_no_torch_and_the_first_question_in_a_second(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "simpletuner", "configure", "--defaults"],
        cwd=folder, env=ENVIRON, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "simpletuner.cli.wizard" in imported
    assert not {"torch", "transformers", "diffusers"} & imported

    def ask() -> None:
        subprocess.run(
            [*START, "configure"], cwd=folder / "pictures", env=ENVIRON, input=b"", check=False
        )

    assert_quick(ask, 1, children_s)


@pytest.mark.timeout(900)
def test_on_a_terminal(folder: Path) -> None:
    """A real pseudo-terminal: lists are chosen from by Enter, `?` and `<` work, Ctrl-C leaves
    nothing.
    """
    screen = Terminal(folder, "configure")
    screen.until("Image folder?")
    screen.type("?\r")
    screen.until("Nothing in it is changed")
    screen.until("Image folder?")
    screen.type("\r")
    screen.until("full model?")
    screen.type("\r")
    screen.until("LoRA rank?")
    screen.type("<\r")
    screen.until("full model?")
    screen.type("\r")
    for text, typed in (
        ("LoRA rank?", "4"), ("Which base model?", ""), ("Training resolution?", ""), ("Batch size?", ""),
        ("checkpointing?", ""), ("steps?", "9"), ("rate?", ""), ("validation images", ""), ("Output", "out"),
    ):  # fmt: skip
        screen.until(text)
        screen.type(f"{typed}\r")
    screen.until("Train:")
    assert screen.ended() == 0
    config, _ = written(folder)
    assert (config["lora_rank"], config["max_train_steps"], config["output_dir"]) == (4, 9, "out")
    again = Terminal(folder, "configure", "--output", "second")
    again.until("Image folder?")
    again.type("\x03")
    assert again.ended() != 0
    assert not (folder / "second").exists()


class Terminal:
    """A command on a pseudo-terminal; what it printed since the last `until`."""

    def __init__(self, cwd: Path, *words: str) -> None:
        pid, self.descriptor = pty.fork()
        if pid == 0:
            os.chdir(cwd)
            os.execvpe(START[0], [*START, *words], {**ENVIRON, "TERM": "xterm", "COLUMNS": "100"})
        self.pid = pid
        self.seen = ""

    def until(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.seen!r}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                try:
                    new = os.read(self.descriptor, 65536).decode("utf-8", "replace")
                except OSError:
                    new = ""
                assert new, f"ended before {text!r}: {self.seen!r}"
                if "\x1b[6n" in new:  # where is the cursor?
                    os.write(self.descriptor, b"\x1b[1;1R")
                self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", new)
        self.seen = self.seen.split(text, 1)[1]

    def type(self, keys: str) -> None:
        time.sleep(0.2)  # the question reads what comes after it is drawn
        os.write(self.descriptor, keys.encode())

    def ended(self) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([self.descriptor], [], [], 0.1)[0]:
                with suppress(OSError):
                    os.read(self.descriptor, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.descriptor)
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it does not end")

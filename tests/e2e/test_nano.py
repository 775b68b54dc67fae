"""The bundled base as a stranger uses it: the example, a rehearsal, a picture. No claim of quality."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from simpletuner.events.event_types import ScoresComputed
from tests.e2e.training_project import read_events
from tests.inside import inside

EXAMPLE = ("train", "--example", "chroma-nano.peft-lora")
FEW = (
    "--max_train_steps=2", "--validation_num_inference_steps=2", "--lr_warmup_steps=0",
    "--evaluation_type=shapes,zorbo", "--evaluation_prompts=4",
)  # fmt: skip


def simpletuner(folder: Path, *arguments: str) -> str:
    """Run a command as a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner", *arguments],
        cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stranger")
    simpletuner(folder, *EXAMPLE, *FEW)
    (run_dir,) = (folder / "output").iterdir()
    return folder, run_dir


def test_the_example_ends_with_before_and_after(trained: tuple[Path, Path]) -> None:
    _, run_dir = trained
    with Image.open(run_dir / "images" / "before_after.png") as sheet:
        assert sheet.height == 30 + 3 * (256 + 8) + 8, "before, after, after at half the strength"
    drawn = {path.name for path in (run_dir / "images" / "step-000002").iterdir()}
    assert {"base-star-0-128x128.png", "base-star-0-128x128-strength-0.5.png"} <= drawn
    assert json.loads((run_dir / "exit.json").read_text())["status"] == "done"
    assert (run_dir / "report.html").stat().st_size > 10_000


def test_the_card_promises_no_other_program(trained: tuple[Path, Path]) -> None:
    _, run_dir = trained
    card = (run_dir / "README.md").read_text()
    assert "ComfyUI" not in card
    (line,) = re.findall(r"^simpletuner .*$", card, re.MULTILINE)
    words = shlex.split(line)[1:]
    done = inside(run_dir, *words, "--steps", "1", "--out", "as-told")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((run_dir / "as-told").glob("*.png"))


def test_the_run_has_scored_itself(trained: tuple[Path, Path]) -> None:
    _, run_dir = trained
    scored = [event for event in read_events(run_dir) if isinstance(event, ScoresComputed)]
    assert [(event.metric, event.step, event.weights) for event in scored] == [
        ("shapes", 0, "base"), ("zorbo", 0, "base"), ("shapes", 2, "trained"), ("zorbo", 2, "trained"),
    ]  # fmt: skip
    assert {event.prompts for event in scored} == {4}
    assert scored[0].rates["background"][2] == 4
    assert scored[0].rates["background"][0] > 0.5, (
        "two steps from noise the ground is there already"
    )
    assert scored[1].rates == {"zorbo": (0.0, 0.0, 4), "all": (0.0, 0.0, 4)}
    report = (run_dir / "report.html").read_text()
    scores = report[report.index("<h2>Scores") : report.index("<h2>Validation images")]
    assert '<th scope="col">before</th><th scope="col">step 2</th>' in scores


def test_the_lora_names_modules_of_chroma(trained: tuple[Path, Path]) -> None:
    _, run_dir = trained
    names = load_file(run_dir / "pytorch_lora_weights.safetensors")
    assert "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight" in names
    assert not any("distilled_guidance_layer" in name for name in names)


def test_the_same_command_again_has_nothing_left_to_do(trained: tuple[Path, Path]) -> None:
    folder, run_dir = trained
    before = (run_dir / "pytorch_lora_weights.safetensors").stat().st_size
    drawn = {path: path.stat().st_mtime_ns for path in run_dir.glob("images/step-*/*.png")}
    scored = sum(isinstance(event, ScoresComputed) for event in read_events(run_dir))
    assert inside(folder, *EXAMPLE, *FEW).returncode == 0
    assert (run_dir / "pytorch_lora_weights.safetensors").stat().st_size == before
    assert {path: path.stat().st_mtime_ns for path in run_dir.glob("images/step-*/*.png")} == drawn
    assert sum(isinstance(event, ScoresComputed) for event in read_events(run_dir)) == scored


def test_generate_with_and_without_the_lora(trained: tuple[Path, Path]) -> None:
    folder, run_dir = trained
    shared = ("--model_flavour", "nano", "--prompt", "a red circle", "--steps", "2", "--seed", "1")
    off_words = ("--out", "off", "--lora", str(run_dir), "--strength", "0")
    for words in (("--out", "plain"), off_words):
        done = inside(folder, "generate", *shared, *words)
        assert done.returncode == 0, done.stdout + done.stderr
    (plain,), (off,) = list((folder / "plain").glob("*.png")), list((folder / "off").glob("*.png"))
    with Image.open(plain) as one, Image.open(off) as other:
        assert one.size == (128, 128)
        assert one.tobytes() == other.tobytes()


def test_a_rehearsal_of_the_example(trained: tuple[Path, Path]) -> None:
    done = inside(trained[0], *EXAMPLE, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready to train" in done.stdout

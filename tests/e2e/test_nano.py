"""The bundled base as a stranger uses it: the example, a rehearsal, a picture. No claim of quality."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

EXAMPLE = ("train", "--example", "chroma-nano.peft-lora")
FEW = ("--max_train_steps=2", "--validation_num_inference_steps=2", "--lr_warmup_steps=0")


def simpletuner(folder: Path, *arguments: str) -> str:
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
        assert min(sheet.size) > 200
    assert json.loads((run_dir / "exit.json").read_text())["status"] == "done"
    assert (run_dir / "report.html").stat().st_size > 10_000


def test_the_lora_names_modules_of_chroma(trained: tuple[Path, Path]) -> None:
    _, run_dir = trained
    names = load_file(run_dir / "pytorch_lora_weights.safetensors")
    assert "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight" in names
    assert not any("distilled_guidance_layer" in name for name in names)


def test_the_same_command_again_has_nothing_left_to_do(trained: tuple[Path, Path]) -> None:
    folder, run_dir = trained
    before = (run_dir / "pytorch_lora_weights.safetensors").stat().st_size
    simpletuner(folder, *EXAMPLE, *FEW)
    assert (run_dir / "pytorch_lora_weights.safetensors").stat().st_size == before


def test_generate_with_and_without_the_lora(trained: tuple[Path, Path]) -> None:
    folder, run_dir = trained
    shared = ("--model_flavour", "nano", "--prompt", "a red circle", "--steps", "2", "--seed", "1")
    simpletuner(folder, "generate", *shared, "--out", "plain")
    simpletuner(folder, "generate", *shared, "--out", "off", "--lora", str(run_dir), "--strength", "0")
    (plain,), (off,) = list((folder / "plain").glob("*.png")), list((folder / "off").glob("*.png"))
    with Image.open(plain) as one, Image.open(off) as other:
        assert one.size == (128, 128)
        assert one.tobytes() == other.tobytes()


def test_a_rehearsal_of_the_example(trained: tuple[Path, Path]) -> None:
    assert "nothing stands in the way" in simpletuner(trained[0], *EXAMPLE, "--rehearse")

"""Draw prompts with a packed model and lay the pictures side by side, each over its prompt's
number.

python recipes/nano/contact_sheet.py --out sheet.png [--model DIR] [--lora PATH] [--seed 7] [--guidance 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

RECIPE_DIR = Path(__file__).parent
COLUMNS, SIDE_PX, GAP_PX = 6, 128, 2


def generate_images(prompts: list[str], args: argparse.Namespace, folder: str) -> list[Image.Image]:
    command = [
        sys.executable,
        "-m",
        "simpletuner",
        "generate",
        "--model_flavour",
        "nano",
        "--size",
        str(SIDE_PX),
    ]
    command += [
        f"--seed={args.seed}",
        f"--guidance={args.guidance}",
        f"--steps={args.steps}",
        f"--out={folder}",
    ]
    command += [f"--prompt={prompt}" for prompt in prompts]
    if args.model:
        command += [f"--pretrained_model_name_or_path={args.model}"]
    if args.lora:
        command += [f"--lora={args.lora}"]
    told = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    files = [line.strip() for line in told.splitlines() if line.strip().endswith(".png")]
    return [Image.open(file).convert("RGB") for file in files[: len(prompts)]]


def make_contact_sheet(pictures: list[Image.Image]) -> Image.Image:
    step = SIDE_PX + GAP_PX
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * step - GAP_PX, rows * step - GAP_PX), "white")
    for number, picture in enumerate(pictures):
        page.paste(picture, (number % COLUMNS * step, number // COLUMNS * step))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a contact sheet with chroma-nano.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=RECIPE_DIR / "prompts.json")
    parser.add_argument("--model")
    parser.add_argument("--lora")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    args = parser.parse_args()
    prompts = list(json.loads(args.prompts.read_text(encoding="utf-8")).values())
    with tempfile.TemporaryDirectory() as folder:
        make_contact_sheet(generate_images(prompts, args, folder)).save(args.out)
    for number, prompt in enumerate(prompts):
        print(f"{number // COLUMNS + 1}.{number % COLUMNS + 1}  {prompt}")


if __name__ == "__main__":
    main()

"""Assemble the bundled model from its parts: bfloat16, diffusers layout.

    python recipes/nano/pack_model.py --base work/base --run work/run --out src/simpletuner/models/nano

The transformer is the moving average in the newest checkpoint of the run, over the base's frozen
approximator; without --run it is the base's own, untrained.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ChromaTransformer2DModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5EncoderModel

MODEL_INDEX = {
    "_class_name": "ChromaPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "ChromaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
    "use_dynamic_shifting": False,
}  # fmt: skip


def newest_ema_file(run: Path) -> Path:
    """The average's file in the checkpoint with the highest step."""
    steps = {
        int(found[1]): path
        for path in run.iterdir()
        if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return steps[max(steps)] / "ema.safetensors"


def pack_transformer(base: Path, run: Path | None, out: Path) -> None:
    model = ChromaTransformer2DModel.from_pretrained(base / "transformer")
    if run is not None:
        file = newest_ema_file(run)
        left = model.load_state_dict(load_file(file), strict=False)
        surplus = [name for name in left.missing_keys if not name.startswith("distilled_guidance_layer.")]
        if surplus or left.unexpected_keys:
            raise SystemExit(f"{file} is not of this transformer: {surplus[:4]} {left.unexpected_keys[:4]}")
        print(f"transformer: {file}")
    model.to(torch.bfloat16).save_pretrained(out / "transformer")


def drop_volatile_fields(folder: Path) -> None:
    """Drop what depends on where and with what the file was written."""
    for file in folder.rglob("*.json"):
        if file.name == "tokenizer.json":
            continue
        config = json.loads(file.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "_diffusers_version", "transformers_version"):
            config.pop(key, None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Assemble chroma-nano.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    pack_transformer(args.base, args.run, args.out)
    AutoencoderKL.from_pretrained(args.base / "vae").to(torch.bfloat16).save_pretrained(args.out / "vae")
    T5EncoderModel.from_pretrained(args.base / "text_encoder").to(torch.bfloat16).save_pretrained(
        args.out / "text_encoder"
    )
    shutil.copytree(args.base / "tokenizer", args.out / "tokenizer")
    AutoTokenizer.from_pretrained(args.out / "tokenizer")
    (args.out / "scheduler").mkdir()
    (args.out / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(SCHEDULER_CONFIG), encoding="utf-8"
    )
    (args.out / "model_index.json").write_text(json.dumps(MODEL_INDEX), encoding="utf-8")
    drop_volatile_fields(args.out)
    sizes = {
        file.relative_to(args.out): file.stat().st_size
        for file in sorted(args.out.rglob("*"))
        if file.is_file()
    }
    for name, size in sizes.items():
        print(f"{size / 1e6:8.3f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:8.3f} MB  together")


if __name__ == "__main__":
    main()

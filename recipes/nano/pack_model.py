"""Assemble the bundled model from its parts: bfloat16, diffusers layout.

    python recipes/nano/pack_model.py --base base --run transformer --out bundle

--run is the folder of train_transformer.py, whose transformer and text encoder are moving averages;
without it both are the base's own, untrained.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ChromaTransformer2DModel
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


def drop_volatile_fields(folder: Path) -> None:
    """Drop what depends on where and with what the file was written."""
    for file in folder.rglob("*.json"):
        if file.name == "tokenizer.json":
            continue
        config = json.loads(file.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "_diffusers_version", "transformers_version"):
            config.pop(key, None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Assemble chroma-nano.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    shutil.rmtree(args.out, ignore_errors=True)
    trained = args.run or args.base
    transformer = ChromaTransformer2DModel.from_pretrained(trained / "transformer")
    transformer.to(torch.bfloat16).save_pretrained(args.out / "transformer")
    AutoencoderKL.from_pretrained(args.base / "vae").to(torch.bfloat16).save_pretrained(
        args.out / "vae"
    )
    T5EncoderModel.from_pretrained(trained / "text_encoder").to(torch.bfloat16).save_pretrained(
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

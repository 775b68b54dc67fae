"""Small random CLIP and DINOv2 checkpoints as the hub holds them, a tokenizer included."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

START, END = "<|startoftext|>", "<|endoftext|>"


def write_preprocessor(folder: Path, kind: str, edge: int, crop: int) -> None:
    config = {
        "image_processor_type": kind, "do_resize": True, "size": {"shortest_edge": edge}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": crop, "width": crop}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def byte_letters() -> list[str]:
    """Return the 256 letters that stand for bytes in a byte-level vocabulary (as GPT-2 has it)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [256 + number for number in range(256 - len(printable))]
    return [chr(code) for code in (*printable, *shifted)]


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer of single bytes without merges; return the size of its vocabulary."""
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": START,
                "eos_token": END,
                "pad_token": END,
                "unk_token": END,
            }
        )
    )
    return len(words)


def make_clip(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    size = write_tokenizer(folder)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {**shape, "vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    randomise(model)
    model.save_pretrained(folder)
    write_preprocessor(folder, "CLIPImageProcessor", 32, 32)
    return folder


def make_dinov2(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
        )
    )
    randomise(model)
    model.save_pretrained(folder)
    write_preprocessor(folder, "BitImageProcessor", 32, 28)
    return folder


def randomise(model: torch.nn.Module) -> None:
    """The library's own start values are so small that every image would look the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)

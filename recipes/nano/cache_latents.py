"""Encode drawings and their captions once: latents and token ids in chunks of 1,000.

    python recipes/nano/cache_latents.py --base base --out latents --count 200000 --workers 14
    python recipes/nano/cache_latents.py --base base --out held --count 256 --seed 62

writes DIR/00000.safetensors, ...: `latents` (N, 16, 16, 16) bfloat16, posterior means scaled for
the transformer; `ids` (N, 40) int16, zero after the end; `lengths` (N,) int16, tokens with </s>.
Chunks that are there are not made again, so more drawings can be added. Drawings that share their
caption, or a meaning that is to stay unseen, with a prompt of the score are left out of what is
trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from budget import device_named
from diffusers import AutoencoderKL
from make_shapes_dataset import render_scene
from parallel import map_in_order
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from vae_images import to_pixels

from simpletuner.validation.shapes import scene_scoring
from simpletuner.validation.shapes.scenes import compose_scene

CHUNK, MAX_TOKENS = 1000, 40
HELD_SEED = 62  # of drawings that only the held-out loss sees
PROMPTS = 200  # of the score

Drawing = tuple[np.ndarray, str]


def render_scenes(address: tuple[int, tuple[int, ...]]) -> tuple[np.ndarray, list[str]]:
    """(seed, scene numbers) -> (N, side, side, 3) uint8 and N captions."""
    seed, numbers = address
    scenes = [compose_scene(seed, number) for number in numbers]
    return np.stack([np.asarray(render_scene(scene)) for scene in scenes]), [
        scene.caption for scene in scenes
    ]


def scene_numbers(seed: int, count: int) -> list[int]:
    """Return the scenes to encode; of the training seed, those that the score does not ask for."""
    if seed != scene_scoring.TRAINED_SEED:
        return list(range(count))
    scenes, new = scene_scoring.unseen_scenes(PROMPTS)
    captions = {scene.caption for scene in scenes}
    meanings = {scene_scoring.scene_key(scene) for scene, is_new in zip(scenes, new) if is_new}

    def trained(number: int) -> bool:
        scene = compose_scene(seed, number)
        return scene.caption not in captions and scene_scoring.scene_key(scene) not in meanings

    return [number for number in range(count) if trained(number)]


class Encoder:
    """The base's VAE and tokenizer."""

    def __init__(self, base: Path, device: torch.device) -> None:
        self.device = device
        self.vae = AutoencoderKL.from_pretrained(base / "vae").float().to(device)
        self.vae.to(memory_format=torch.channels_last)
        self.tokenizer = AutoTokenizer.from_pretrained(base / "tokenizer")

    @torch.no_grad()
    def encode(self, levels: np.ndarray, captions: list[str]) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16):
            raw = self.vae.encode(to_pixels(levels, self.device)).latent_dist.mean.float()
        config = self.vae.config
        latents = (raw - config.shift_factor) * config.scaling_factor
        return {"latents": latents.to(torch.bfloat16).cpu().contiguous(), **self.tokens(captions)}

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        ids = torch.zeros(len(captions), MAX_TOKENS, dtype=torch.int16)
        lengths = torch.zeros(len(captions), dtype=torch.int16)
        for row, caption in enumerate(captions):
            tokens = self.tokenizer(caption)["input_ids"]
            if len(tokens) >= MAX_TOKENS:
                raise SystemExit(f"{len(tokens)} tokens, at most {MAX_TOKENS - 1}: {caption}")
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
            lengths[row] = len(tokens)
        return {"ids": ids, "lengths": lengths}


def cache_scenes(
    base: Path, out: Path, count: int, seed: int, device: torch.device, workers: int, size: int
) -> None:
    """Write every chunk that is missing."""
    out.mkdir(parents=True, exist_ok=True)
    numbers = scene_numbers(seed, count)
    chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
    files = [out / f"{index:05d}.safetensors" for index in range(len(chunks))]
    missing = [
        (file, chunk) for file, chunk in zip(files, chunks) if count_rows(file) != len(chunk)
    ]
    if not missing:
        return
    encoder = Encoder(base, device)
    parts = [
        (file, chunk[start : start + size])
        for file, chunk in missing
        for start in range(0, len(chunk), size)
    ]
    drawn = map_in_order(render_scenes, ((seed, tuple(part)) for _, part in parts), workers)
    rows: list[dict[str, Tensor]] = []
    for index, ((file, _), (levels, captions)) in enumerate(zip(parts, drawn)):
        rows.append(encoder.encode(levels, captions))
        if index + 1 == len(parts) or parts[index + 1][0] != file:
            write_chunk(file, {name: torch.cat([row[name] for row in rows]) for name in rows[0]})
            rows = []


def count_rows(file: Path) -> int:
    """Return the drawings in a chunk, 0 where there is no file."""
    if not file.exists():
        return 0
    with safe_open(file, framework="pt") as chunk:
        return int(chunk.get_slice("ids").get_shape()[0])


def write_chunk(file: Path, tensors: dict[str, Tensor]) -> None:
    partial = file.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(file)


def load_chunks(folder: Path, most: int | None = None) -> dict[str, Tensor]:
    """All chunks as one; at most so many drawings."""
    files: Iterator[Path] = iter(sorted(folder.glob("*.safetensors")))
    chunks, count = [], 0
    for file in files:
        chunks.append(load_file(file))
        count += len(chunks[-1]["ids"])
        if most is not None and count >= most:
            break
    if not chunks:
        raise SystemExit(f"{folder} holds no latents; cache_latents.py writes them.")
    return {name: torch.cat([chunk[name] for chunk in chunks])[:most] for name in chunks[0]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Encode drawings and captions for train_transformer.py."
    )
    parser.add_argument("--base", type=Path, required=True, help="folder with vae and tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=scene_scoring.TRAINED_SEED)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw")
    parser.add_argument("--batch-size", type=int, default=50)
    args = parser.parse_args(arguments)
    device = device_named(args.device)
    cache_scenes(args.base, args.out, args.count, args.seed, device, args.workers, args.batch_size)


if __name__ == "__main__":
    main()

"""Does chroma-nano draw what a prompt says? 200 unseen prompts, fixed noise, read by geometry: no
judge.

    python recipes/nano/score.py --sheet score.png                  the bundled base
    python recipes/nano/score.py --lora RUN --strength 0.5          the same with a LoRA: what it
    forgets
    python recipes/nano/score.py --zorbo --lora RUN                 32 unseen zorbos: what the
    lesson taught
    python recipes/nano/score.py --truth [--zorbo] [--vae FOLDER]   pictures drawn by program: all is right
    python recipes/nano/score.py --truth --shuffled                 prompts against others'
    pictures: chance

prints one line of JSON: each rate with its standard error and the number it is taken over. Colour,
position and shape are counted per object, size per object whose size is said, the rest per prompt.
`pair`: colour, position and shape of both objects right. `all`: everything said is right and
nothing else is there. `all_new`: the same, over combinations that no training picture has. With
--zorbo: `zorbo` is there, `all` is there and as said; the others over the pictures that have one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from make_shapes_dataset import render_scene
from PIL import Image, ImageDraw, ImageFont

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import SimpleTunerError
from simpletuner.models.registry import get_family as family_named
from simpletuner.validation.shapes.detection import detect_scene
from simpletuner.validation.shapes.scene_scoring import (
    NOISE_SEED,
    SCORING_SEED,
    SceneScores,
    compute_rates,
    held_out_zorbo_scenes,
    score_scene,
    score_zorbo_scene,
    unseen_scenes,
)
from simpletuner.validation.shapes.scenes import SIDE_PX, Scene, random_generator
from simpletuner.validation.shapes.zorbo import detect_zorbo

VAE_BATCH = 8
GREEN, RED = (0, 125, 40), (205, 0, 0)


def shuffle_scenes(scenes: Sequence[Scene]) -> list[Scene]:
    """In one random ring each scene takes the place of the next: none keeps its own."""
    order = random_generator(SCORING_SEED, "shuffled", len(scenes)).permutation(len(scenes))
    moved = list(scenes)
    for place, taken in zip(order, np.roll(order, 1)):
        moved[place] = scenes[taken]
    return moved


def reconstruct_with_vae(pictures: Sequence[Image.Image], folder: Path) -> list[Image.Image]:
    """Encoded to the posterior's mean and decoded: the best that any transformer could draw."""
    import torch
    from diffusers import AutoencoderKL

    from simpletuner.validation.validation_images import pixels_to_image

    vae = AutoencoderKL.from_pretrained(folder).float()
    decoded = []
    with torch.no_grad():
        for start in range(0, len(pictures), VAE_BATCH):
            levels = np.stack(
                [np.asarray(picture) for picture in pictures[start : start + VAE_BATCH]]
            )
            pixels = torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 127.5 - 1
            back = vae.decode(vae.encode(pixels).latent_dist.mean).sample
            decoded += [pixels_to_image(one) for one in back.split(1)]
    return decoded


def model_options(args: argparse.Namespace) -> ModelOptions:
    return ModelOptions(
        model_flavour="nano", pretrained_model_name_or_path=args.model,
        pretrained_transformer_model_name_or_path=args.transformer,
    )  # fmt: skip


def generate_images(scenes: Sequence[Scene], args: argparse.Namespace) -> list[Image.Image]:
    """What `simpletuner generate` draws for the captions."""
    from simpletuner.cli.generation import GenerationRequest, generate_images
    from simpletuner.cli.trained_weights import find_lora_file
    from simpletuner.events.terminal_sink import TerminalSink
    from simpletuner.validation.prompts import Prompt

    prompts = tuple(
        Prompt(f"{number:03d}", scene.caption, seed=NOISE_SEED + number)
        for number, scene in enumerate(scenes)
    )
    lora = None if args.lora is None else find_lora_file(args.lora)
    with tempfile.TemporaryDirectory() as scratch:
        request = GenerationRequest(
            prompts, model_options(args), lora, (args.strength,), args.steps, args.guidance, NOISE_SEED,
            str(SIDE_PX), 1, args.keep or Path(scratch),
        )  # fmt: skip
        return [
            Image.open(path).convert("RGB")
            for path in generate_images(request, TerminalSink(sys.stderr))
        ]


def make_score_sheet(
    scenes: Sequence[Scene], pictures: Sequence[Image.Image], verdicts: Sequence[SceneScores]
) -> Image.Image:
    """Pictures over their prompts; every word below is green where the picture has it, red where
    not.
    """
    columns, side, words, gap = 6, 192, 74, 6
    rows = -(-len(pictures) // columns)
    page = Image.new(
        "RGB", (columns * (side + gap) + gap, rows * (side + words + gap) + gap), "white"
    )
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for number, (scene, picture, verdict) in enumerate(zip(scenes, pictures, verdicts)):
        left = gap + number % columns * (side + gap)
        top = gap + number // columns * (side + words + gap)
        page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        for row, line in enumerate(_attribute_marks(scene, verdict)):
            x = float(left)
            for word, right in line:
                pen.text(
                    (x, top + side + 2 + 14 * row),
                    word,
                    fill=GREEN if right else RED,
                    font=font,
                )
                x += pen.textlength(word + "  ", font=font)
    return page


def _attribute_marks(scene: Scene, verdict: SceneScores) -> Iterator[list[tuple[str, bool]]]:
    """Lines of words with their verdicts: the whole picture's, then each object's."""
    first = "zorbo" if "zorbo" in verdict else "count"
    name = (
        "zorbo"
        if first == "zorbo"
        else f"{len(scene.objects)} object{'s' * (len(scene.objects) > 1)}"
    )
    yield [(scene.background, verdict["background"] == [True]), (name, verdict[first][0])]
    for number, thing in enumerate(scene.objects):
        said = {
            "size": thing.size,
            "colour": thing.colour,
            "shape": thing.shape,
            "position": thing.position,
        }
        line = [
            (word, verdict[what][number : number + 1] == [True])
            for what, word in said.items()
            if word and what in verdict
        ]
        yield [*line, (thing.pattern, True)] if thing.pattern != "plain" else line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Score chroma-nano's pictures against their prompts."
    )
    parser.add_argument("--model", help="another base: a diffusers folder")
    parser.add_argument("--transformer", help="another transformer: a tuned one's folder")
    parser.add_argument(
        "--lora", type=Path, help="a LoRA file, a checkpoint folder or a run folder"
    )
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--count", type=int, help="prompts; default 200, zorbos 32")
    parser.add_argument(
        "--zorbo", action="store_true", help="the lesson's concept instead of the base's shapes"
    )
    parser.add_argument("--truth", action="store_true", help="score the truth, drawn by program")
    parser.add_argument("--vae", type=Path, help="with --truth: through this VAE first")
    parser.add_argument("--shuffled", action="store_true", help="prompts against others' pictures")
    parser.add_argument("--sheet", type=Path, help="write the first 24 with a mark per attribute")
    parser.add_argument("--keep", type=Path, help="keep the pictures in this folder")
    args = parser.parse_args()
    if args.vae and not args.truth:
        parser.error("--vae goes with --truth")
    if args.truth and (args.model or args.transformer or args.lora):
        parser.error("--truth is drawn by program: without --model, --transformer and --lora")
    return args


def score_images(args: argparse.Namespace) -> dict[str, object]:
    began = time.monotonic()
    if args.zorbo:
        scenes = held_out_zorbo_scenes(args.count or 32)
        new = [False] * len(scenes)
    else:
        scenes, new = unseen_scenes(args.count or 200)
    drawn = [render_scene(s) for s in scenes] if args.truth else generate_images(scenes, args)
    pictures = reconstruct_with_vae(drawn, args.vae) if args.vae else drawn
    if args.shuffled:
        scenes, new = shuffle_scenes(scenes), [False] * len(scenes)
    if args.zorbo:
        verdicts = [
            score_zorbo_scene(scene, detect_zorbo(picture))
            for scene, picture in zip(scenes, pictures)
        ]
    else:
        verdicts = [
            score_scene(scene, detect_scene(picture), is_new)
            for scene, picture, is_new in zip(scenes, pictures, new)
        ]
    if args.sheet:
        make_score_sheet(scenes[:24], pictures[:24], verdicts[:24]).save(args.sheet)
    figures = {
        name: {"rate": round(one.rate, 4), "se": round(one.standard_error, 4), "of": one.total}
        for name, one in compute_rates(verdicts).items()
    }
    told: dict[str, object] = {"scores": figures}
    if args.zorbo and args.truth and not args.shuffled:
        others = [render_scene(scene) for scene in unseen_scenes(200)[0]]
        others = reconstruct_with_vae(others, args.vae) if args.vae else others
        told["zorbos_in_base_pictures"] = sum(
            detect_zorbo(picture) is not None for picture in others
        ) / len(others)
    told |= {
        "prompts": len(scenes),
        "prompt_seed": SCORING_SEED,
        "settings": describe_settings(args),
    }
    return told | {"seconds": round(time.monotonic() - began, 1)}


def describe_settings(args: argparse.Namespace) -> dict[str, object]:
    """What decides the figures; weights by their fingerprint, so that a table knows what it
    compares.
    """
    told = {name: getattr(args, name) for name in ("zorbo", "shuffled") if getattr(args, name)}
    if args.truth:
        return {**told, "truth": True, **({"vae": str(args.vae)} if args.vae else {})}
    told |= {"steps": args.steps, "guidance": args.guidance, "noise_seed": NOISE_SEED}
    if args.lora:
        told |= {"lora": str(args.lora), "strength": args.strength}
    family, model = family_named("chroma"), model_options(args)
    return {**told, "transformer": family.transformer_fingerprint(family.locate_files(model))[:12]}


def main() -> None:
    try:
        print(json.dumps(score_images(parse_arguments())))
    except SimpleTunerError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

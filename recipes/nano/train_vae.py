"""Train chroma-nano's picture codec: an AutoencoderKL with 16 latent channels and stride 8.

    python recipes/nano/train_vae.py --out DIR --steps 4000

goes on from DIR/state.pt if there is one. At the end, and every --save steps, DIR/vae holds a diffusers
folder with the shift and scale of its latents, and DIR/log.jsonl the losses and the PSNR on unseen pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from draw import render_scene
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn

from simpletuner.randomness import seed_at
from simpletuner.validation.shapes.scenes import SIDE_PX, compose_scene, random_generator

TRAIN_SEED, UNSEEN_SEED = 11, 12
CROP_PX = 64
KL_WEIGHT, EDGE_WEIGHT, COARSE_WEIGHT = 2e-4, 0.5, 0.25


def build_vae() -> AutoencoderKL:
    """1.8 M parameters. One group per norm: with many small groups a flat colour is normalised away.

    The main path starts as an orthogonal map of each place's channels (an average where it halves), with
    default noise on top and quiet residual branches. From the default start a picture's hue takes thousands
    of steps to arrive; from this one, a hundred.
    """
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 96), layers_per_block=1, latent_channels=16, norm_num_groups=1,
        sample_size=SIDE_PX, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d):
                _initialise_conv(name, layer)
    return model


def _initialise_conv(name: str, layer: nn.Conv2d) -> None:
    if ".resnets." in name and not name.endswith("conv_shortcut"):
        if name.endswith("conv2"):
            layer.weight.mul_(0.2)
        return
    through = nn.init.orthogonal_(torch.empty(layer.out_channels, layer.in_channels))
    through *= max(1.0, layer.out_channels / layer.in_channels) ** 0.5
    layer.bias.zero_()
    layer.weight.mul_(0.3)
    if "downsamplers" in name:  # padded right and below only, so that these four taps are the 2x2 square
        layer.weight[:, :, :2, :2] += through[:, :, None, None] / 4
    else:
        middle = layer.kernel_size[0] // 2
        layer.weight[:, :, middle, middle] += through


def random_texture(rng: np.random.Generator, side: int) -> Image.Image:
    """A photograph's statistics, roughly: coloured noise of many scales, with flat objects on it."""
    picture = np.zeros((side, side, 3))
    for scale in (2, 4, 8, 16, 32, 64):
        coarse = rng.normal(size=(scale, scale, 3)) * rng.uniform(0, 1) / scale**0.8
        grey = rng.normal(size=(scale, scale, 1)) * rng.uniform(0, 1.5) / scale**0.8
        layer = coarse + grey
        for channel in range(3):
            grown = Image.fromarray(layer[..., channel].astype(np.float32)).resize(
                (side, side), Image.BICUBIC
            )
            picture[..., channel] += np.asarray(grown)
    picture = picture / (picture.std() + 1e-6) * rng.uniform(15, 60) + rng.uniform(40, 215, size=3)
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    big = image.resize((side * 2, side * 2), Image.BILINEAR)
    pen = ImageDraw.Draw(big)
    for _ in range(int(rng.integers(0, 12))):
        colour = tuple(int(v) for v in rng.integers(0, 256, size=3))
        xy = rng.uniform(-0.1, 1.1, size=(int(rng.integers(2, 6)), 2)) * side * 2
        kind = rng.integers(4)
        if kind == 0:
            pen.line([tuple(p) for p in xy], fill=colour, width=int(rng.integers(2, 12)))
        elif kind == 1 and len(xy) > 2:
            pen.polygon([tuple(p) for p in xy], fill=colour)
        else:
            (x, y), radius = xy[0], rng.uniform(4, side * 0.6, size=2)
            box = (x - radius[0], y - radius[1], x + radius[0], y + radius[1])
            pen.ellipse(box, fill=colour) if kind == 2 else pen.rectangle(box, fill=colour)
    image = big.resize((side, side), Image.BOX)
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 2)))) if rng.random() < 0.3 else image


def training_image(seed: int, number: int) -> Image.Image:
    """Two in three: a drawn scene, now and then with other colours; else a texture."""
    rng = random_generator(seed, "vae picture", number)
    if rng.random() < 0.35:
        return random_texture(rng, SIDE_PX)
    image = render_scene(compose_scene(seed, number))
    if rng.random() < 0.2:
        pixels = np.asarray(image)[..., rng.permutation(3)]
        image = Image.fromarray(np.ascontiguousarray(pixels if rng.random() < 0.5 else 255 - pixels))
    return image


def make_batch(step: int, size: int, side: int) -> Tensor:
    """(size, 3, side, side) in [-1, 1]: a pure function of the step. Two crops are taken of every picture."""
    rng = random_generator(TRAIN_SEED, "vae crops", step)
    crops = []
    each = 1 if side == SIDE_PX else 2
    for i in range(size // each):
        pixels = np.asarray(training_image(TRAIN_SEED, step * size + i))
        for _ in range(each):
            top, left = rng.integers(0, SIDE_PX - side + 1, size=2)
            crops.append(pixels[top : top + side, left : left + side])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


def pixel_differences(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def vae_loss(model: AutoencoderKL, pixels: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
    """L1 + L2 + L1 of the differences + KL per latent; and halved latents must decode to the halved picture.

    The last term keeps fine detail out of the latents' high frequencies, which a small transformer then
    finds easier to predict (the idea of EQ-VAE, Kouzelis et al. 2025).
    """
    torch.manual_seed(seed_at(TRAIN_SEED, "vae posterior", step))
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(pixels).latent_dist  # without a gradient where the encoder is frozen
        latents = posterior.sample()
        decoded = model.decode(latents).sample.float()
    flat = (decoded - pixels).abs().mean() + (decoded - pixels).square().mean()
    sharp = sum(
        ((a - b).abs().mean() for a, b in zip(pixel_differences(decoded), pixel_differences(pixels))),
        torch.zeros(()),
    )
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    total = flat + EDGE_WEIGHT * sharp + KL_WEIGHT * divergence
    if step % 4 == 0:
        with torch.autocast("cpu", torch.bfloat16):
            coarse = model.decode(F.avg_pool2d(latents, 2)).sample.float()
        total = total + COARSE_WEIGHT * (coarse - F.avg_pool2d(pixels, 2)).abs().mean()
    return total, {"flat": flat.item(), "edge": sharp.item(), "kl": divergence.item()}


def psnr(model: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over pictures of 10 log10(1 / MSE) on [0, 1] pixels, from the posterior mean."""
    with torch.no_grad():
        decoded = torch.cat([model.decode(model.encode(p).latent_dist.mean).sample for p in pixels.split(8)])
    error = ((decoded.clamp(-1, 1) - pixels) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def unseen_pixels(count: int, drawn: bool) -> Tensor:
    images = [
        render_scene(compose_scene(UNSEEN_SEED, n))
        if drawn
        else random_texture(random_generator(UNSEEN_SEED, "texture", n), SIDE_PX)
        for n in range(count)
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def measure_vae(model: AutoencoderKL) -> dict[str, float]:
    """PSNR, and the shift and scale that give the latents of drawn pictures mean 0 and deviation 1."""
    drawn = unseen_pixels(48, drawn=True)
    with torch.no_grad():
        fixed = torch.Generator().manual_seed(seed_at(UNSEEN_SEED, "vae posterior"))
        latents = torch.cat([model.encode(p).latent_dist.sample(fixed) for p in drawn.split(8)])
    model.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    spread = latents.std(dim=(0, 2, 3))
    return {
        "psnr_drawn": psnr(model, drawn), "psnr_textures": psnr(model, unseen_pixels(16, drawn=False)),
        "shift": float(latents.mean()), "scale": float(1 / latents.std()),
        "channel_std_min": float(spread.min()), "channel_std_max": float(spread.max()),
    }  # fmt: skip


def training_batches(first: int, last: int, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    for step in range(first, last):
        whole = (
            step >= last * 0.85
        )  # whole pictures at the end: crops never show the network a picture's border
        yield step, make_batch(step, batch_size // 4 if whole else batch_size, SIDE_PX if whole else CROP_PX)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train chroma-nano's AutoencoderKL.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--decoder-only", action="store_true", help="latents stay as they are from now on")
    parser.add_argument("--save", type=int, default=300)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed_at(TRAIN_SEED, "vae weights"))
    model = build_vae().to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    first, state_file = 0, args.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    if args.decoder_only:  # the averaged encoder is the one that was saved
        model.encoder.load_state_dict(average.module.encoder.state_dict())
        model.encoder.requires_grad_(False)
    began = time.monotonic()
    with (args.out / "log.jsonl").open("a") as log:
        for step, pixels in training_batches(first, args.steps, args.batch_size):
            falling = 0.51 + 0.49 * math.cos(math.pi * step / args.steps)
            rate = args.learning_rate * min(1, (step + 1) / 100) * falling
            for group in optimizer.param_groups:
                group["lr"] = rate
            total, parts = vae_loss(model, pixels.to(memory_format=torch.channels_last), step)
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
            row: dict[str, float] = {"step": step, **parts, "seconds": time.monotonic() - began}
            if (step + 1) % args.save == 0 or step + 1 == args.steps:
                row |= measure_vae(average.module)
                average.module.save_pretrained(args.out / "vae")
                partial = state_file.with_suffix(".partial")
                torch.save({"model": model.state_dict(), "average": average.state_dict(),
                            "optimizer": optimizer.state_dict(), "step": step + 1}, partial)  # fmt: skip
                partial.replace(state_file)
            if step % 25 == 0 or "psnr_drawn" in row:
                print(json.dumps(row), file=log, flush=True)


if __name__ == "__main__":
    main()

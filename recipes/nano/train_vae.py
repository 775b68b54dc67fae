"""Train chroma-nano's image codec: an AutoencoderKL with 16 latent channels and stride 8.

    python recipes/nano/train_vae.py --out crops --side 64 --batch-size 12 --steps 3300
    python recipes/nano/train_vae.py --out vae --init crops/vae --steps 6000     (on whole images)
    python recipes/nano/train_vae.py --out vae --init crops/vae --minutes 3 --workers 14

resumes from DIR/state.pt if there is one. At the end, and every --save steps, DIR/vae holds the
moving average as a diffusers folder with the shift and scale of its latents, and DIR/log.jsonl the
losses and the PSNR on unseen images. Crops are enough for the start; but a group norm over a whole
map sees other statistics there than over an image, so the second command, on whole images, is the
longer one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from budget import Average, Budget, RunState, StopSignal, add_budget, device_named, learning_rate
from diffusers import AutoencoderKL
from muon import Muon
from parallel import map_in_order
from torch import Tensor, nn
from vae_images import TRAIN_SEED, UNSEEN_SEED, BatchAddress, make_batch, to_pixels, unseen_images

from simpletuner.randomness import seed_at
from simpletuner.validation.shapes.scenes import SIDE_PX

WARMUP, DECAY, COARSE_EVERY = 50, 0.998, 4
RMSE_WEIGHT, EDGE_WEIGHT, COARSE_WEIGHT, KL_WEIGHT = 1.0, 0.5, 0.25, 1e-4


def build_vae() -> AutoencoderKL:
    """1.8 M parameters. One group per norm: with many small groups a flat colour is normalised
    away.

    The main path starts as an orthogonal map of each place's channels (an average where it halves),
    with default noise on top and quiet residual branches. From the default start a picture's hue
    takes thousands of steps to arrive; from this one, a hundred.
    """
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=SIDE_PX,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d):
                _initialise_weights(name, layer)
    return model


def _initialise_weights(name: str, layer: nn.Conv2d) -> None:
    if ".resnets." in name and not name.endswith("conv_shortcut"):
        if name.endswith("conv2"):
            layer.weight.mul_(0.2)
        return
    through = nn.init.orthogonal_(torch.empty(layer.out_channels, layer.in_channels))
    through *= max(1.0, layer.out_channels / layer.in_channels) ** 0.5
    layer.bias.zero_()
    layer.weight.mul_(0.3)
    if (
        "downsamplers" in name
    ):  # padded right and below only, so that these four taps are the 2x2 square
        layer.weight[:, :, :2, :2] += through[:, :, None, None] / 4
    else:
        middle = layer.kernel_size[0] // 2
        layer.weight[:, :, middle, middle] += through


def load_folded(folder: Path, count: int) -> AutoencoderKL:
    """A trained VAE whose latent channels have mean 0 and deviation 1 over `count` unseen drawings.

    The channels' statistics are folded into the encoder's last and the decoder's first convolution.
    Where the decoder pads with zeros, a shifted mean is another border; the training that follows
    adapts to it.
    """
    model = AutoencoderKL.from_pretrained(folder).float()
    mean, std = channel_statistics(model, unseen_images(count, True, torch.device("cpu")))
    fold_statistics(model, mean, std)
    return model


def channel_statistics(model: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every latent channel, (16,) each, of posterior samples."""
    draw = torch.Generator().manual_seed(seed_at(UNSEEN_SEED, "vae posterior"))
    with torch.no_grad():
        parts = [model.encode(part).latent_dist for part in pixels.split(8)]
    noise = [torch.randn(part.mean.shape, generator=draw).to(pixels.device) for part in parts]
    latents = torch.cat([part.mean + part.std * one for part, one in zip(parts, noise)])
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


@torch.no_grad()
def fold_statistics(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Replace the latents z by (z - mean) / std and let the decoder undo it."""
    channels = len(mean)
    last, first = model.encoder.conv_out, model.decoder.conv_in
    last.weight[:channels] /= std[:, None, None, None]
    last.bias[:channels] = (last.bias[:channels] - mean) / std
    last.bias[channels:] -= 2 * std.log()
    first.bias += torch.einsum("oihw,i->o", first.weight, mean)
    first.weight *= std[None, :, None, None]


def neighbour_differences(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def compute_loss(model: nn.Module, pixels: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 + RMSE per image + L1 of the differences + KL per latent; and halved latents must decode
    to the halved image.

    The RMSE is what the PSNR measures; it weighs the few wrong pixels, which lie at the edges. The
    last term keeps fine detail out of the latents' high frequencies, which a small transformer then
    finds easier to predict (the idea of EQ-VAE, Kouzelis et al. 2025).
    """
    noise = torch.Generator().manual_seed(seed_at(TRAIN_SEED, "vae posterior", step))
    with torch.autocast(pixels.device.type, torch.bfloat16):
        posterior = model.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        draw = torch.randn(mean.shape, generator=noise).to(pixels.device)
        latents = mean + (0.5 * logvar).exp() * draw
        decoded = model.decode(latents).sample.float()
    error = decoded - pixels
    flat = error.abs().mean()
    rmse = (error.square().flatten(1).mean(1) + 1e-8).sqrt().mean()
    sharp = sum(
        (
            (a - b).abs().mean()
            for a, b in zip(neighbour_differences(decoded), neighbour_differences(pixels))
        ),
        error.new_zeros(()),
    )
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    total = flat + RMSE_WEIGHT * rmse + EDGE_WEIGHT * sharp + KL_WEIGHT * divergence
    if step % COARSE_EVERY == 0:
        with torch.autocast(pixels.device.type, torch.bfloat16):
            coarse = model.decode(F.avg_pool2d(latents, 2)).sample.float()
        total = total + COARSE_WEIGHT * (coarse - F.avg_pool2d(pixels, 2)).abs().mean()
    return total, {"flat": flat, "rmse": rmse, "edge": sharp, "kl": divergence}


def compute_psnr(model: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over images of 10 log10(1 / MSE) on [0, 1] pixels, from the posterior mean, float32."""
    with torch.no_grad():
        decoded = torch.cat(
            [model.decode(model.encode(p).latent_dist.mean).sample for p in pixels.split(8)]
        )
    error = ((decoded.clamp(-1, 1) - pixels) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def evaluate_vae(model: AutoencoderKL, device: torch.device, count: int) -> dict[str, float]:
    """PSNR, and the shift and scale that give the latents of drawings mean 0 and deviation 1."""
    drawn, textures = (
        unseen_images(count, True, device),
        unseen_images(max(1, count // 3), False, device),
    )
    mean, std = channel_statistics(model, drawn)
    shift = float(mean.mean())
    scale = float(1 / (std.square() + (mean - shift).square()).mean().sqrt())
    model.register_to_config(shift_factor=shift, scaling_factor=scale)
    return {
        "psnr_drawn": compute_psnr(model, drawn),
        "psnr_textures": compute_psnr(model, textures),
        "shift": shift,
        "scale": scale,
        "channel_std_min": float(std.min()),
        "channel_std_max": float(std.max()),
    }


class Trainer:
    """The model, its average and its optimizer; one file of state."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = device_named(args.device)
        torch.manual_seed(seed_at(TRAIN_SEED, "vae weights"))
        self.model = (build_vae() if args.init is None else load_folded(args.init, args.unseen)).to(
            self.device
        )
        self.averaged = build_vae().to(self.device)
        self.average = Average(self.model, DECAY)
        ends = (self.model.encoder.conv_in, self.model.decoder.conv_out)
        self.optimizer = Muon(
            self.model.parameters(), args.learning_rate, by_adam=[end.weight for end in ends]
        )
        self.budget = Budget(args.steps, args.minutes)
        self.state = RunState(
            args.out, model=self.model, average=self.average, optimizer=self.optimizer
        )
        self.step = self.state.load(self.budget, self.device)
        self.args = args

    def batches(self) -> Iterator[Tensor]:
        size, side = self.args.batch_size, self.args.side
        last = self.budget.steps or 10**9
        addresses = (BatchAddress(step, size, side) for step in range(self.step, last))
        for levels in map_in_order(make_batch, addresses, self.args.workers):
            yield to_pixels(levels, self.device)

    def train(self) -> None:
        with StopSignal(lambda: self.state.save(self.step, self.budget)) as stop:
            for pixels in self.batches():
                progress = self.budget.progress(self.step)
                if progress >= 1:
                    break
                parts = self.update(pixels, progress)
                self.step += 1
                if self.step % self.args.save == 0:
                    self.save(parts)
                elif self.step % 25 == 1:
                    self.state.log_row(self.row(parts))
                stop.check()
        if self.step % self.args.save or not self.state.file.exists():
            self.save({})

    def update(self, pixels: Tensor, progress: float) -> dict[str, Tensor]:
        rate = learning_rate(self.args.learning_rate, progress, self.step, WARMUP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, parts = compute_loss(self.model, pixels, self.step)
        self.optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        return parts

    def row(self, parts: dict[str, Tensor]) -> dict[str, float]:
        losses = {name: round(value.item(), 5) for name, value in parts.items()}
        return {"step": self.step, **losses, "seconds": round(self.budget.elapsed(), 1)}

    def save(self, parts: dict[str, Tensor]) -> None:
        self.state.save(self.step, self.budget)
        self.average.copy_to(self.averaged)
        self.state.log_row(
            self.row(parts) | evaluate_vae(self.averaged, self.device, self.args.unseen)
        )
        self.averaged.save_pretrained(self.args.out / "vae")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train chroma-nano's AutoencoderKL.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--init", type=Path, help="start from this VAE's weights: a diffusers folder"
    )
    parser.add_argument(
        "--side", type=int, default=SIDE_PX, help="px; less than whole images: crops"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--unseen", type=int, default=48, help="drawings for the PSNR; a third as many textures"
    )
    add_budget(parser)
    Trainer(parser.parse_args(arguments)).train()


if __name__ == "__main__":
    main()

"""Train chroma-nano's transformer on cached latents, with or without its text encoder.

    P="recipes/nano/train_transformer.py --base base --latents latents --held held --out run"
    python $P --steps 6000
    python $P --minutes 6 --batch-size 512 --compile --device cuda

resumes from DIR/state.pt if there is one. The network, the path, the target and the noise levels
are `simpletuner`'s own; what differs from `simpletuner train` is that latents and token ids lie in
memory. At every --save steps DIR/transformer and DIR/text_encoder hold the moving average, and
DIR/log.jsonl gets the held-out loss: over unseen drawings with fixed noise at evenly spread noise
levels, of the average. It does not depend on the density that is trained, the batch or the text
encoder, so runs can be compared by it (over the same latents).
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path

import torch
from budget import Average, Budget, RunState, StopSignal, add_budget, device_named, learning_rate
from cache_latents import load_chunks
from muon import Muon
from torch import Tensor, nn
from transformers import T5EncoderModel

from simpletuner.config.schema import FlowOptions
from simpletuner.flow.densities import sample_sigmas
from simpletuner.flow.objective import add_noise, velocity_target
from simpletuner.models.chroma.family import FROZEN_PREFIX, pack_latents, unpack_latents
from simpletuner.models.chroma.weights import load_transformer, save_transformer
from simpletuner.randomness import seed_at

SEED, HELD_NOISE_SEED = 51, 52
WARMUP = 100
DROPPED = 0.1  # share of captions that are empty
ADAM_RATE = 0.25  # of Muon's: embeddings, the last layer, norms and biases
COMPILED_TOKENS = 40  # one length of text, so that a compiled block is one program
GRID = (8, 8)
END = 1  # </s>


@lru_cache(maxsize=2)
def epoch_order(count: int, epoch: int) -> Tensor:
    """A permutation of its own for every epoch."""
    draw = torch.Generator().manual_seed(seed_at(SEED, "order", epoch))
    return torch.randperm(count, generator=draw)


class Data:
    """Latents, ids and lengths in memory."""

    def __init__(self, folder: Path, device: torch.device, most: int | None = None) -> None:
        tensors = load_chunks(folder, most)
        self.latents = tensors["latents"].to(device)
        self.ids, self.lengths = tensors["ids"].long().to(device), tensors["lengths"].long()

    def __len__(self) -> int:
        return len(self.latents)

    def indices(self, first: int, count: int) -> Tensor:
        """Which drawings are numbers first, first + 1, ... of the endless stream of epochs."""
        epochs = range(first // len(self), (first + count - 1) // len(self) + 1)
        stream = torch.cat([epoch_order(len(self), epoch) for epoch in epochs])
        return stream[first % len(self) :][:count]


class Networks(nn.Module):
    """The transformer and the text encoder before it."""

    def __init__(self, base: Path, device: torch.device, train_text: bool) -> None:
        super().__init__()
        self.transformer = load_transformer(base / "transformer", device, torch.float32)
        self.transformer.masked = True
        self.text_encoder = T5EncoderModel.from_pretrained(base / "text_encoder").float().to(device)
        self.text_encoder.requires_grad_(train_text)
        for name, param in self.transformer.named_parameters():
            param.requires_grad_(not name.startswith(FROZEN_PREFIX))

    def trained(self) -> list[Tensor]:
        return [param for param in self.parameters() if param.requires_grad]

    def by_adam(self) -> list[Tensor]:
        return [self.transformer.proj_out.weight, self.text_encoder.shared.weight]

    def forward(
        self, x: Tensor, sigma: Tensor, ids: Tensor, lengths: Tensor, text_width: int
    ) -> Tensor:
        """Velocity. x: (B, 16, 16, 16). ids: (B, L) zero after the end. text_width: rows, 0 for the
        most.

        As `simpletuner` encodes captions: the real tokens and one pad row.
        """
        rows = text_width or int(lengths.max()) + 1
        ids = ids[:, :rows]
        mask = (torch.arange(rows)[None] < lengths[:, None]).to(ids.device, torch.long)
        text = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        tokens = self.transformer(pack_latents(x), sigma, text, GRID, tuple((lengths + 1).tolist()))
        return unpack_latents(tokens, GRID).float()

    def save(self, out: Path) -> None:
        save_transformer(self.transformer, out / "transformer")
        self.text_encoder.save_pretrained(out / "text_encoder")


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, device_named(args.device)
        self.flow = FlowOptions(chroma_sigma_density=args.sigma_density)
        self.networks = Networks(args.base, self.device, args.train_text)
        self.averaged = Networks(args.base, self.device, args.train_text)
        self.average = Average(self.networks, args.ema_decay)
        self.optimizer = Muon(
            self.networks.trained(),
            args.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=args.weight_decay,
            by_adam=self.networks.by_adam(),
        )
        self.text_width = 0
        if args.compile:
            self.text_width = COMPILED_TOKENS
            for block in self.networks.transformer.blocks:
                block.compile()
        self.data = Data(args.latents, self.device, args.most)
        self.held = Data(args.held, self.device)
        self.budget = Budget(args.steps, args.minutes)
        self.state = RunState(
            args.out, model=self.networks, average=self.average, optimizer=self.optimizer
        )
        self.step = self.state.load(self.budget, self.device)
        self.losses: list[Tensor] = []

    def generator(self, *address: int | str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed_at(SEED, *address))

    def loss(self) -> Tensor:
        """Of one batch, a pure function of the step."""
        size = self.args.batch_size
        indices = self.data.indices(self.step * size, size)
        draw = self.generator("noise", self.step)
        latents = self.data.latents[indices.to(self.device)].float()
        noise = torch.randn(latents.shape, generator=draw, device=self.device)
        sigma = sample_sigmas(self.flow, SEED, self.step, size).to(self.device)
        ids, lengths = self.data.ids[indices.to(self.device)], self.data.lengths[indices]
        empty = torch.rand(
            size, generator=torch.Generator().manual_seed(seed_at(SEED, "empty", self.step))
        )
        ids, lengths = without_caption(ids, lengths, empty < DROPPED)
        return self.error(self.networks, latents, noise, sigma, ids, lengths).mean()

    def error(
        self,
        networks: Networks,
        latents: Tensor,
        noise: Tensor,
        sigma: Tensor,
        ids: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        """(B,) mean square error of the velocity."""
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity = networks(
                add_noise(latents, noise, sigma), sigma, ids, lengths, self.text_width
            )
        return (velocity - velocity_target(latents, noise)).square().flatten(1).mean(1)

    @torch.no_grad()
    def held_out(self) -> float:
        """Of the average, over all held-out drawings."""
        self.average.copy_to(self.averaged)
        count = len(self.held)
        draw = torch.Generator().manual_seed(seed_at(HELD_NOISE_SEED, "noise"))
        noise = torch.randn(self.held.latents.shape, generator=draw).to(self.device)
        sigma = ((torch.randperm(count, generator=draw) + 0.5) / count).to(self.device)
        errors = []
        for part in torch.arange(count).split(64):
            there = part.to(self.device)
            errors.append(
                self.error(
                    self.averaged,
                    self.held.latents[there].float(),
                    noise[there],
                    sigma[there],
                    self.held.ids[there],
                    self.held.lengths[part],
                )
            )
        return torch.cat(errors).mean().item()

    def train(self) -> None:
        with StopSignal(lambda: self.state.save(self.step, self.budget)) as stop:
            while (progress := self.budget.progress(self.step)) < 1:
                self.update(progress)
                self.step += 1
                if self.step % self.args.save == 0:
                    self.save()
                stop.check()
        if self.step % self.args.save or not self.state.file.exists():
            self.save()

    def update(self, progress: float) -> None:
        rate = learning_rate(self.args.learning_rate, progress, self.step, WARMUP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if group["muon"] else rate * ADAM_RATE
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.networks.trained(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.losses.append(loss.detach())
        if self.step % 25 == 24:
            self.state.log_row(self.row())

    def row(self) -> dict[str, float]:
        """Of the steps since the last row."""
        mean = torch.stack(self.losses).mean().item()
        self.losses = []
        return {
            "step": self.step + 1,
            "loss": round(mean, 5),
            "seconds": round(self.budget.elapsed(), 1),
        }

    def save(self) -> None:
        self.state.save(self.step, self.budget)
        held = self.held_out()
        self.state.log_row(
            {
                "step": self.step,
                "held_out": round(held, 5),
                "seconds": round(self.budget.elapsed(), 1),
            }
        )
        self.averaged.save(self.args.out)


def without_caption(ids: Tensor, lengths: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Where `empty`, only </s> is left."""
    ids, lengths = ids.clone(), lengths.clone()
    rows = empty.nonzero()[:, 0].to(ids.device)
    ids[rows] = 0
    ids[rows, 0] = END
    lengths[empty] = 1
    return ids, lengths


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train chroma-nano's transformer.")
    parser.add_argument(
        "--base", type=Path, required=True, help="untrained transformer and text encoder"
    )
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--held", type=Path, required=True)
    parser.add_argument("--most", type=int, help="drawings that are trained on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=8e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--sigma-density", default="quadratic")
    parser.add_argument("--ema-decay", type=float, default=0.998)
    parser.add_argument("--train-text", action="store_true", help="the text encoder learns along")
    parser.add_argument("--compile", action="store_true", help="compile every block")
    add_budget(parser)
    Trainer(parser.parse_args(arguments)).train()


if __name__ == "__main__":
    main()

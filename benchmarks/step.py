"""One LoRA training step of a full-width slice of Chroma (1 double, 1 single block) against the usual one.

    python benchmarks/step.py --px 512            # one JSON line per size; ratio = ours / theirs
    python benchmarks/step.py --px 1024 --repeats 1

Theirs: diffusers' ChromaTransformer2DModel with PEFT's float32 adapters, 512 text rows and a boolean mask.
Ours: the same bf16 weights, the same modules adapted, the same caption trimmed to its tokens and one pad.
Time is CPU seconds of the process (one thread), the least of `repeats` after `warmup`, both in one run and
taking turns, so that a busy machine does not favour one of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from diffusers import ChromaTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.adapters.attachment import attach_adapter
from simpletuner.cache.batch_types import TextBatch
from simpletuner.config.schema import AdapterOptions
from simpletuner.models.chroma.family import ChromaFamily, pack_latents
from simpletuner.models.chroma.lora_programs import CHROMA_LORA
from simpletuner.models.chroma.transformer import ChromaTransformer, TransformerConfig

MAX_TOKENS = 512
Step = Callable[[], Tensor]


def build() -> tuple[nn.Module, ChromaTransformer]:
    """Both networks over the same bf16 weights."""
    torch.manual_seed(0)
    slice_of = {"num_layers": 1, "num_single_layers": 1}
    theirs = ChromaTransformer2DModel(**slice_of).bfloat16().requires_grad_(False)
    with torch.device("meta"):
        ours = ChromaTransformer(TransformerConfig.from_dict(slice_of, "slice"))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, ours.requires_grad_(False)


def their_step(
    model: nn.Module, names: list[str], latents: Tensor, sigma: Tensor, text: Tensor, real: int
) -> Step:
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=16, target_modules=names), model)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    mask = torch.ones(1, MAX_TOKENS + rows * columns, dtype=torch.bool)
    mask[:, real:MAX_TOKENS] = False
    optimizer = torch.optim.AdamW(adapters)
    target = pack_latents(latents)

    def step() -> Tensor:
        tokens = target.bfloat16()
        text_ids = torch.zeros(MAX_TOKENS, 3)
        output = model(tokens, text, sigma, ids.view(-1, 3), text_ids, mask, return_dict=False)[0]
        return learn((output.float() - target).square().mean(), optimizer)

    return step


def our_step(
    model: ChromaTransformer, names: list[str], latents: Tensor, sigma: Tensor, text: Tensor
) -> Step:
    attached = attach_adapter(model, AdapterOptions(), names, seed=0, names=CHROMA_LORA.names)
    optimizer = torch.optim.AdamW([parameter for _, parameter in attached.trainable])
    batch = TextBatch(text, (text.shape[1],))

    def step() -> Tensor:
        velocity = ChromaFamily().predict_velocity(model, latents, sigma, batch)
        return learn((velocity - latents).square().mean(), optimizer)

    return step


def learn(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def timed(step: Step) -> tuple[float, float]:
    started = time.process_time()
    loss = step()
    return time.process_time() - started, float(loss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--px", type=int, default=512, help="side of the square picture")
    parser.add_argument("--tokens", type=int, default=60, help="tokens of the caption")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    given = parser.parse_args()

    torch.set_num_threads(1)
    theirs, ours = build()
    names = ChromaFamily().lora_targets(ours, "all")
    latents, sigma = torch.randn(1, 16, given.px // 8, given.px // 8), torch.tensor([0.6543])
    text = torch.randn(1, MAX_TOKENS, 4096, dtype=torch.bfloat16)
    real = given.tokens + 1
    steps = {
        "theirs": their_step(theirs, names, latents, sigma, text, real),
        "ours": our_step(ours, names, latents, sigma, text[:, :real].clone()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for turn in range(given.warmup + given.repeats):
        for name, step in steps.items():
            taken, loss = timed(step)
            losses.setdefault(name, loss)  # before any update
            if turn >= given.warmup:
                seconds[name].append(taken)
    best = {name: min(times) for name, times in seconds.items()}
    ratio = best["ours"] / best["theirs"]
    line = {"benchmark": "step", "px": given.px, "tokens": given.tokens, "modules": len(names)}
    print(json.dumps(line | {"cpu_s": best, "ratio": round(ratio, 3), "first_loss": losses}))


if __name__ == "__main__":
    main()

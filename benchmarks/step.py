"""One LoRA training step of a slice of Chroma at full width, against diffusers' and PEFT's.

    python -m benchmarks.step --px 512            # one JSON line
    python -m benchmarks.step --px 1024

The slice is one double and one single block. Theirs: diffusers' ChromaTransformer2DModel with
PEFT's float32 adapters, 512 text rows and a boolean mask. Ours: the same bf16 weights, the same
modules adapted, the same caption trimmed to its tokens and one pad. Time is CPU seconds of the
process, one thread. ratio is ours / theirs: the median of the pairs, with its quartiles
(benchmarks/paired.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from benchmarks.paired import add_pairs, compare, environment
from diffusers import ChromaTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.adapters.attachment import attach_adapter
from simpletuner.cache.batch_types import TextBatch
from simpletuner.config.schema import AdapterOptions
from simpletuner.models.chroma.family import ChromaFamily, pack_latents
from simpletuner.models.chroma.fingerprints import T5_TENSOR
from simpletuner.models.chroma.lora_programs import CHROMA_LORA
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.chroma.transformer_config import TransformerConfig

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
    batch = TextBatch({T5_TENSOR: text}, {T5_TENSOR: (text.shape[1],)})

    def step() -> Tensor:
        velocity = ChromaFamily().predict_velocity(model, latents, sigma, batch)
        return learn((velocity - latents).square().mean(), optimizer)

    return step


def learn(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--px", type=int, default=512, help="side of the square image")
    parser.add_argument("--tokens", type=int, default=60, help="tokens of the caption")
    add_pairs(parser)
    given = parser.parse_args()

    torch.set_num_threads(1)
    theirs, ours = build()
    names = ChromaFamily().lora_targets(ours, "all")
    latents, sigma = torch.randn(1, 16, given.px // 8, given.px // 8), torch.tensor([0.6543])
    text = torch.randn(1, MAX_TOKENS, 4096, dtype=torch.bfloat16)
    real = given.tokens + 1
    run_theirs = their_step(theirs, names, latents, sigma, text, real)
    run_ours = our_step(ours, names, latents, sigma, text[:, :real].clone())
    # These two are the warm-up too, and their losses are those before any update.
    losses = {"ours": float(run_ours()), "theirs": float(run_theirs())}
    found = compare(run_ours, run_theirs, given.pairs, warmup=0).cpu()
    line = {"benchmark": "step", "px": given.px, "tokens": given.tokens, "modules": len(names)}
    print(json.dumps({**line, **found, "first_loss": losses, **environment()}))


if __name__ == "__main__":
    main()

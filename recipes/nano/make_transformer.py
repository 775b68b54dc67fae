"""Make chroma-nano's untrained transformer: Chroma's architecture, small, with its approximator
fitted.

    python recipes/nano/make_transformer.py --out DIR      (a minute or two; writes DIR/transformer)

The approximator turns sigma into every modulation vector and is never trained along with the
blocks. Big Chroma got it by distillation; here a short regression fits it to a table written down
below: shifts and scales that are smooth functions of sigma, at several frequencies, so that every
layer receives the time precisely, and gates around one. Then it is frozen for good.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor, nn

from simpletuner.randomness import seed_at

SEED = 31
FREQUENCIES = 8
SHIFT_STD, SCALE_STD, GATE_STD, LAST_SCALE_STD = (
    0.5,
    0.25,
    0.25,
    0.6,
)  # deviations over sigma and width


def model_config(heads: int, double: int, single: int) -> dict[str, Any]:
    """The fields of the config; the width is 64 per head."""
    return {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": 256,
        "axes_dims_rope": (8, 28, 28),
        "approximator_num_channels": 64,
        "approximator_hidden_dim": 128,
        "approximator_layers": 3,
    }


def modulation_roles(double: int, single: int) -> list[str]:
    """What each modulation vector is, in Chroma's order: shift, scale, gate triples; the output
    norm last.
    """
    return ["shift", "scale", "gate"] * (single + 4 * double) + ["last shift", "last scale"]


def target_modulations(sigma: Tensor, width: int, roles: list[str]) -> Tensor:
    """(S,) sigmas -> (S, modulations, width): the modulations to be fitted, in the order of
    `roles`.

    A role's vectors are random mixtures of cos(pi m sigma), m = 1 .. 8, with weights falling as 1 /
    sqrt(m); blocks share the mixtures, since each block's own linears can read them as they like.
    """
    draw = torch.Generator().manual_seed(seed_at(SEED, "modulations"))
    order = torch.arange(1, FREQUENCIES + 1)
    waves = torch.cos(math.pi * sigma[:, None] * order) / order.sqrt()
    waves = waves * (2 / (1 / order).sum()).sqrt()
    rows = {
        role: offset + size * waves @ torch.randn(FREQUENCIES, width, generator=draw)
        for role, offset, size in (
            ("shift", 0.0, SHIFT_STD), ("scale", 0.0, SCALE_STD), ("gate", 1.0, GATE_STD),
            ("last shift", 0.0, 0.0), ("last scale", 0.0, LAST_SCALE_STD),
        )
    }  # fmt: skip
    return torch.stack([rows[role] for role in roles], dim=1)


def fit_approximator(model: ChromaTransformer2DModel, steps: int) -> float:
    """Regress the approximator on the table. Returns the root mean square error left."""
    approximator, embed = model.distilled_guidance_layer, model.time_text_embed
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    roles = modulation_roles(config.num_layers, config.num_single_layers)

    def square_error(sigma: Tensor) -> Tensor:
        fitted = approximator(embed(sigma * 1000))
        return (fitted - target_modulations(sigma, width, roles)).square().mean()

    optimizer = torch.optim.AdamW(approximator.parameters(), lr=3e-3, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed_at(SEED, "fit"))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        error = square_error(torch.rand(24, generator=draw))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    with torch.no_grad():
        return float(square_error(torch.linspace(0, 1, 101)).sqrt())


def initialise_weights(model: ChromaTransformer2DModel) -> None:
    """Xavier for the linears, residual branches damped with depth, a zero last layer: a quiet
    start.
    """
    torch.manual_seed(seed_at(SEED, "transformer"))
    depth = math.sqrt(2 * (model.config.num_layers + model.config.num_single_layers))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.startswith("distilled_guidance_layer"):
            continue
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
        if name.endswith(("to_out.0", "to_add_out", "net.2", "proj_out")):
            module.weight.data.div_(depth)
    nn.init.zeros_(model.proj_out.weight)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make chroma-nano's untrained transformer.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", type=int, default=4, help="the width is 64 per head")
    parser.add_argument("--double", type=int, default=1, help="double blocks")
    parser.add_argument("--single", type=int, default=8, help="single blocks")
    parser.add_argument("--fit-steps", type=int, default=2000)
    args = parser.parse_args(arguments)
    torch.manual_seed(seed_at(SEED, "approximator"))
    model = ChromaTransformer2DModel(**model_config(args.heads, args.double, args.single))
    initialise_weights(model)
    left = fit_approximator(model, args.fit_steps)
    model.save_pretrained(args.out / "transformer")
    count = sum(param.numel() for param in model.parameters())
    print(f"{count:,} parameters; modulations fitted to {left:.4f} RMS")


if __name__ == "__main__":
    main()

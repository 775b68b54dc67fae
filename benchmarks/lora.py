"""Our LoRA linears against PEFT's own: time, and bytes saved for the backward pass.

    python -m benchmarks.lora [--width 3072] [--tokens 1085] [--rank 16] [--pairs 7]

Four projections of one attention (q, k, v of one input, then out) over a frozen bf16 base with
float32 factors, forward and backward. Prints one JSON line; ratio is ours / PEFT's in CPU seconds
of one thread, the median of the pairs with its quartiles (benchmarks/paired.py).
"""

from __future__ import annotations

import argparse
import json

import torch
from benchmarks.paired import add_pairs, compare, environment
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.adapters.attachment import attach_adapter
from simpletuner.config.schema import AdapterOptions
from simpletuner.models.chroma.lora_programs import CHROMA_LORA

NAMES = ["to_q", "to_k", "to_v", "to_out"]


class Projections(nn.Module):
    """The linears of an attention, with a sum in place of the attention itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in NAMES)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.to_q(x) + self.to_k(x) + self.to_v(x))


def make(width: int, rank: int, ours: bool) -> Projections:
    torch.manual_seed(0)
    network = Projections(width).bfloat16()
    if ours:
        attach_adapter(
            network, AdapterOptions(lora_rank=rank), NAMES, seed=0, names=CHROMA_LORA.names
        )
        return network
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=NAMES), network)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return network


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Return the bytes of the distinct storages that autograd saves, without the parameters'."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        y = network(x)
    assert y.requires_grad
    return sum(
        tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own
    )


def step(network: nn.Module, x: Tensor) -> None:
    network(x).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("width", 3072), ("tokens", 1085), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    add_pairs(parser)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    networks = {name: make(chosen.width, chosen.rank, name == "ours") for name in ("peft", "ours")}
    x = torch.randn(1, chosen.tokens, chosen.width).bfloat16().requires_grad_()
    found = compare(
        lambda: step(networks["ours"], x), lambda: step(networks["peft"], x), chosen.pairs
    ).cpu()
    saved = {name: saved_bytes(network, x) for name, network in networks.items()}
    result = {
        "benchmark": "lora",
        **vars(chosen),
        **found,
        "theirs_saved_mb": round(saved["peft"] / 1e6, 2),
        "ours_saved_mb": round(saved["ours"] / 1e6, 2),
        "saved_ratio": round(saved["ours"] / saved["peft"], 3),
        **environment(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Our LoRA linears against PEFT's own, forward and backward: process seconds and bytes kept for the backward.

    python benchmarks/lora.py [--width 3072] [--tokens 1085] [--rank 16] [--rounds 5]

Four projections of one attention (q, k, v of one input, then out) over a frozen bf16 base with float32
factors. Both variants run in turn in one process; the least of the rounds counts. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
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
        attach_adapter(network, AdapterOptions(lora_rank=rank), NAMES, seed=0, names=CHROMA_LORA.names)
        return network
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=NAMES), network)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return network


def kept_bytes(network: nn.Module, x: Tensor) -> int:
    """Distinct storages that autograd keeps, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = network(x)
    assert y.requires_grad
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)


def seconds(network: nn.Module, x: Tensor) -> float:
    started = time.process_time()
    network(x).sum().backward()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("width", 3072), ("tokens", 1085), ("rank", 16), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    networks = {name: make(chosen.width, chosen.rank, name == "ours") for name in ("peft", "ours")}
    x = torch.randn(1, chosen.tokens, chosen.width).bfloat16().requires_grad_()
    for network in networks.values():
        seconds(network, x)
    rounds = [{name: seconds(network, x) for name, network in networks.items()} for _ in range(chosen.rounds)]
    best = {name: min(each[name] for each in rounds) for name in networks}
    kept = {name: kept_bytes(network, x) for name, network in networks.items()}
    result = {
        "benchmark": "lora",
        **vars(chosen),
        "peft_s": round(best["peft"], 4),
        "ours_s": round(best["ours"], 4),
        "time_ratio": round(best["ours"] / best["peft"], 3),
        "peft_kept_mb": round(kept["peft"] / 1e6, 2),
        "ours_kept_mb": round(kept["ours"] / 1e6, 2),
        "kept_ratio": round(kept["ours"] / kept["peft"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

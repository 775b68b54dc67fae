"""Factors that are cast once a step: the numbers of casting them in every pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from simpletuner.adapters.adapted_linear import LoraLinear
from simpletuner.adapters.factor_copies import AdapterCopies


class Casts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += out.dtype == torch.bfloat16
        return out


def network(dropout: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16).bfloat16() for _ in range(3)]
    return nn.Sequential(
        *(
            LoraLinear(layer, torch.randn(4, 16), torch.randn(16, 4), 0.5, dropout)
            for layer in layers
        )
    )


def factors(layers: nn.Module) -> list[nn.Parameter]:
    return [param for param in layers.parameters() if param.requires_grad]


def gradients(layers: nn.Module, draw: int) -> list[Tensor]:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(draw)).bfloat16()
    torch.manual_seed(draw)
    checkpoint(layers, x.requires_grad_(), use_reentrant=False).float().square().sum().backward()
    found = [param.grad for param in factors(layers)]
    layers.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_copies_change_no_bit_and_follow_the_factors(dropout: float) -> None:
    """Also after the factors change without torch seeing it, as through `.data`."""
    plain, copied = network(dropout), network(dropout)
    copies = AdapterCopies(copied, torch.bfloat16)
    for step in range(3):
        expected = gradients(plain, step)
        with copies.current():
            found = gradients(copied, step)
        assert all(map(torch.equal, expected, found))
        for param in (*factors(plain), *factors(copied)):
            param.data.mul_(1.5)
    outside = gradients(copied, 9)
    assert all(map(torch.equal, outside, gradients(plain, 9)))


def test_nothing_is_cast_inside() -> None:
    layers = network(0.0)
    with Casts() as plain:
        gradients(layers, 0)
    copies = AdapterCopies(layers, torch.bfloat16)
    with copies.current(), Casts() as copied:
        gradients(layers, 0)
    # Both factors of three modules in three passes; and the input, and the gradient of the output.
    assert (plain.count, copied.count) == (3 * 2 * 3 + 2, 2)


def test_float32_products_need_no_copies() -> None:
    layers = network(0.0).float()
    with AdapterCopies(layers, torch.float32).current():
        assert all(layer.factor_copies is None for layer in layers)

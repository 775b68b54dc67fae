"""The penalty on an adapter's change, against the change itself and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simpletuner.adapters.adapted_linear import AdaptedLinear, LoraLinear, LycorisLinear
from simpletuner.adapters.delta_penalty import delta_penalty, squared_delta_norm
from simpletuner.adapters.deltas import LycorisDelta
from simpletuner.adapters.dora_linear import DoraLinear
from simpletuner.errors import ConfigError

OUT, IN, RANK = 12, 10, 3


def randn(*shape: int) -> Tensor:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))
    )


def linear() -> nn.Linear:
    return nn.Linear(IN, OUT, dtype=torch.float64)


def make_lora(scale: float = 0.5, principal: bool = False) -> LoraLinear:
    module = LoraLinear(linear(), randn(RANK, IN), randn(OUT, RANK), scale, principal=principal)
    with torch.no_grad():
        module.down.add_(0.1)
        module.up.sub_(0.2)
    return module


def make_lokr(**factors: Tensor) -> LycorisLinear:
    return LycorisLinear(linear(), LycorisDelta(factors, 0.7))


def dense(module: AdaptedLinear) -> Tensor:
    """The change of the weight, with a gradient, from the definition of the adapter."""
    if isinstance(module, LoraLinear):
        delta = module.up @ module.down
        if module.initial_up is not None and module.initial_down is not None:
            delta = delta - module.initial_up @ module.initial_down
        return module.scale * delta
    assert isinstance(module, LycorisLinear)
    parts = dict(module.factors.items())
    w1, w2 = (
        parts.get(f"lokr_w{n}")
        if f"lokr_w{n}" in parts
        else parts[f"lokr_w{n}_a"] @ parts[f"lokr_w{n}_b"]
        for n in "12"
    )
    return module.scale * torch.kron(w1, w2)


MODULES = {
    "LoRA": lambda: make_lora(),
    "PiSSA": lambda: make_lora(principal=True),
    "LoKr": lambda: make_lokr(lokr_w1=randn(3, 2), lokr_w2=randn(4, 5)),
    "LoKr, decomposed": lambda: make_lokr(
        lokr_w1_a=randn(3, 1), lokr_w1_b=randn(1, 2), lokr_w2_a=randn(4, 2), lokr_w2_b=randn(2, 5)
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_closed_form_has_the_value_and_the_gradient_of_the_norm(name: str) -> None:
    module = MODULES[name]()
    params = list(module.adapter_parameters().values())
    expected = dense(module).square().sum()
    found = squared_delta_norm(module)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for mine, reference in zip(
        torch.autograd.grad(found, params), torch.autograd.grad(expected, params), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


def test_an_adapter_without_a_change_has_no_penalty() -> None:
    module = LoraLinear(linear(), randn(RANK, IN), randn(OUT, RANK), 1.0, principal=True)
    norm = squared_delta_norm(module)
    assert abs(float(norm.detach())) < 1e-10
    gradients = torch.autograd.grad(norm, list(module.adapter_parameters().values()))
    assert all(float(gradient.abs().max()) < 1e-10 for gradient in gradients)


def test_it_is_added_once_a_step() -> None:
    network = nn.Sequential(make_lora(), make_lora(2.0))
    penalty = delta_penalty(network, 0.25)
    expected = 0.25 * sum(squared_delta_norm(module) for module in (network[0], network[1]))
    torch.testing.assert_close(torch.as_tensor(penalty(0)), torch.as_tensor(expected))
    assert penalty(1) == penalty(7) == 0.0
    assert delta_penalty(network, 0.0)(0) == 0.0


def test_what_has_no_closed_form_is_named() -> None:
    loha = make_lokr(
        hada_w1_a=randn(OUT, 1),
        hada_w1_b=randn(1, IN),
        hada_w2_a=randn(OUT, 1),
        hada_w2_b=randn(1, IN),
    )
    for module, kind in (
        (loha, "LoHa"),
        (DoraLinear(linear(), randn(RANK, IN), randn(OUT, RANK)), "DoRA"),
    ):
        with pytest.raises(ConfigError, match=f"{kind}'s change"):
            squared_delta_norm(module)

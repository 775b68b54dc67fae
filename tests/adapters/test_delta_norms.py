"""Norms of deltas in closed form equal those of the deltas that they are of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.adapters import adapted_linear, dora_linear
from simpletuner.adapters.attachment import attach_adapter
from simpletuner.adapters.delta_norms import squared_change, squared_weight
from simpletuner.config.schema import RunConfig
from simpletuner.models import registry


def change_by_columns(module: adapted_linear.AdaptedLinear) -> float:
    """The change of the output for every unit vector: the columns of the change of the weight."""
    module = module.double() if isinstance(module, dora_linear.DoraLinear) else module
    unit = torch.eye(module.shape[1], dtype=next(module.parameters()).dtype)
    with torch.no_grad():
        changed = module(unit)
        module.strength = 0.0
        base = module(unit)
        module.strength = 1.0
    return float((changed - base).double().square().sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_init_type": "pissa"},
        {"use_dora": True},
        {"lora_type": "lycoris", "lycoris_config": {"algo": "loha", "linear_dim": 3}},
        {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr", "linear_dim": 2, "factor": 2}},
    ],
    ids=["lora", "pissa", "dora", "loha", "lokr"],
)
def test_norms_in_closed_form(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8, bias=False))
    adapter = RunConfig().adapter.model_copy(update={"lora_rank": 3, **options})
    names = registry.get_family("chroma").lora_conventions.names
    attach_adapter(net, adapter, ["0"], 1, names)
    module = adapted_linear.adapted_modules(net)["0"]
    with torch.no_grad():
        for parameter in module.adapter_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = change_by_columns(module)
    assert expected > 1e-3
    assert squared_change(module) == pytest.approx(expected, rel=1e-4)


def test_the_norm_of_the_base_is_that_of_its_weight() -> None:
    linear = nn.Linear(7, 3000, bias=False).to(torch.bfloat16)
    expected = float(linear.weight.double().square().sum())
    assert squared_weight(linear) == pytest.approx(expected, rel=1e-6)

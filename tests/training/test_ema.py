from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import CheckpointError
from simpletuner.training.ema import Ema, resolve_ema_device


def start(dtype: torch.dtype = torch.float32, **options):
    params = [
        ("a", nn.Parameter(torch.zeros(3, dtype=dtype))),
        ("b", nn.Parameter(torch.ones(2, 2, dtype=dtype))),
    ]
    return params, Ema(params, OptimizerOptions(use_ema=True, **options))


def move(params, step: int) -> None:
    with torch.no_grad():
        for _, param in params:
            param.add_(
                torch.linspace(0.1, 1, param.numel()).view(param.shape).to(param.dtype)
                * (1 + step % 3)
            )


@pytest.mark.parametrize("interval", [1, 3])
def test_closed_form(interval):
    params, ema = start(ema_decay=0.5, ema_update_interval=interval)
    expected = {name: param.detach().double() for name, param in params}
    updates = 0
    for step in range(40):
        move(params, step)
        ema.update(step)
        if (step + 1) % interval == 0:
            decay = min(0.5, (1 + updates) / (10 + updates))
            updates += 1
            expected = {
                name: decay * expected[name] + (1 - decay) * param.detach()
                for name, param in params
            }
    assert ema.updates == updates
    for name, shadow in ema.shadow.items():
        assert torch.allclose(shadow.double(), expected[name], rtol=1e-5)


def test_float32_shadow_of_bf16_weights():
    params, ema = start(torch.bfloat16, ema_decay=0.999)
    for step in range(20):
        move(params, step)
        ema.update(step)
    assert {shadow.dtype for shadow in ema.shadow.values()} == {torch.float32}
    assert any(not torch.equal(s, s.bfloat16().float()) for s in ema.shadow.values())


def test_swapped_gives_everything_back_even_after_an_error():
    params, ema = start()
    for step in range(5):
        move(params, step)
        ema.update(step)
    trained = [param.detach().clone() for _, param in params]
    with ema.swapped_weights():
        for name, param in params:
            assert torch.equal(param, ema.shadow[name])
            assert not torch.equal(param, trained[[n for n, _ in params].index(name)])
    assert all(torch.equal(param, kept) for (_, param), kept in zip(params, trained))
    with pytest.raises(ZeroDivisionError), ema.swapped_weights():
        raise ZeroDivisionError
    assert all(torch.equal(param, kept) for (_, param), kept in zip(params, trained))


@pytest.mark.parametrize("interval", [1, 2])
def test_resumed_equals_uninterrupted(interval):
    params, ema = start(ema_update_interval=interval)
    for step in range(5):
        move(params, step)
        ema.update(step)
    other, resumed = start(ema_update_interval=interval)
    state = ema.state_dict()
    resumed.load_state_dict(
        {**state, "shadow": {name: tensor.clone() for name, tensor in state["shadow"].items()}}
    )
    forgetful, cold = start(ema_update_interval=interval)
    cold.shadow = {name: tensor.clone() for name, tensor in state["shadow"].items()}
    for (_, mine), (_, third), (_, param) in zip(other, forgetful, params):
        mine.data.copy_(param)
        third.data.copy_(param)
    for step in range(5, 9):
        for each, average in ((params, ema), (other, resumed), (forgetful, cold)):
            move(each, step)
            average.update(step)
    assert resumed.updates == ema.updates
    assert all(torch.equal(resumed.shadow[name], ema.shadow[name]) for name in ema.shadow)
    assert not all(torch.equal(cold.shadow[name], ema.shadow[name]) for name in ema.shadow)


def test_refuses_another_networks_average():
    _, ema = start()
    with pytest.raises(CheckpointError, match="other trainable parameters"):
        ema.load_state_dict({"updates": 1, "shadow": {"a": torch.zeros(3)}})
    with pytest.raises(CheckpointError):
        ema.load_state_dict({"updates": 1, "shadow": {"a": torch.zeros(3), "b": torch.zeros(3)}})


def test_the_average_of_an_adapter_is_on_the_accelerator():
    options = OptimizerOptions(use_ema=True)
    assert resolve_ema_device(options, trains_adapter=True) == "accelerator"
    assert resolve_ema_device(options, trains_adapter=False) == "cpu"
    chosen = OptimizerOptions(use_ema=True, ema_device="cpu")
    assert resolve_ema_device(chosen, trains_adapter=True) == "cpu"

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from simpletuner.adapters.adapted_linear import adapted_modules
from simpletuner.adapters.attachment import set_strength
from simpletuner.config.constraints import find_errors
from simpletuner.config.schema import AdapterOptions, RunConfig
from simpletuner.errors import ConfigError, ModelError
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.tiny_network import attention_names, perturb, run_forward, tiny_chroma


def attached(options: AdapterOptions, dtype: torch.dtype = torch.float64, seed: int = 5):
    network = tiny_chroma(dtype)
    return network, attach_adapter(network, options, attention_names(network), seed, dtype)


def test_counts_names_and_what_trains():
    network, result = attached(AdapterOptions(lora_rank=4), torch.float32)
    names = attention_names(tiny_chroma())
    assert result.modules == len(names) == 2 * 8 + 2 * 3
    assert result.parameters == result.modules * 4 * (32 + 32)
    assert result.scale == 1.0
    theirs = tiny_chroma()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=names), theirs)
    assert {name for name, _ in result.trainable} == set(get_peft_model_state_dict(theirs))
    assert {id(p) for _, p in result.trainable} == {
        id(p) for p in network.parameters() if p.requires_grad
    }


def test_exactly_the_named_modules_although_a_name_ends_another():
    network = tiny_chroma()
    attach_adapter(network, AdapterOptions(lora_rank=2), ["proj_out"], 0)
    assert list(adapted_modules(network)) == ["proj_out"]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_follows_the_mode_of_the_network(training):
    network = tiny_chroma().train(training)
    attach_adapter(network, AdapterOptions(lora_dropout=0.5), ["proj_out"], 0)
    assert {module.training for module in network.modules()} == {training}


def test_masters_are_float32_over_a_bf16_base():
    network = tiny_chroma(torch.bfloat16)
    result = attach_adapter(network, AdapterOptions(use_dora=True), attention_names(network), 0)
    assert {parameter.dtype for _, parameter in result.trainable} == {torch.float32}
    assert network.proj_out.weight.dtype == torch.bfloat16


def test_start_is_addressed_by_name_and_leaves_the_global_generator_alone():
    names = attention_names(tiny_chroma())
    networks = tiny_chroma(), tiny_chroma()
    torch.manual_seed(3)
    first = attach_adapter(networks[0], AdapterOptions(), names, 5)
    untouched = torch.rand(1)
    torch.manual_seed(4)
    second = attach_adapter(networks[1], AdapterOptions(), list(reversed(names[:7])), 5)
    torch.manual_seed(3)
    assert torch.equal(untouched, torch.rand(1))
    ours = dict(first.trainable)
    for name, parameter in second.trainable:
        assert torch.equal(parameter, ours[name])
    other = attach_adapter(tiny_chroma(), AdapterOptions(), names, 6)
    assert not torch.equal(other.trainable[0][1], first.trainable[0][1])
    starts = [p for name, p in first.trainable if "lora_A" in name and p.shape[1] == 32]
    assert not any(torch.equal(starts[0], start) for start in starts[1:])


@pytest.mark.parametrize(
    ("kind", "std"), [("default", 1 / math.sqrt(3 * 32)), ("gaussian", 1 / 16)]
)
def test_start_has_the_published_spread(kind, std):
    _, result = attached(AdapterOptions(lora_rank=16, lora_init_type=kind))
    downs = torch.cat(
        [
            p.detach().flatten()
            for name, p in result.trainable
            if "lora_A" in name and p.shape[1] == 32
        ]
    )
    assert float(downs.std()) == pytest.approx(std, rel=0.03)
    assert abs(float(downs.mean())) < 4 * std / math.sqrt(len(downs))
    assert all(not p.any() for name, p in result.trainable if "lora_B" in name)


@pytest.mark.parametrize(
    "options",
    [
        AdapterOptions(lora_rank=4),
        AdapterOptions(lora_rank=4, lora_alpha=3.0),
        AdapterOptions(lora_rank=4, lora_alpha=3.0, use_rslora=True),
        AdapterOptions(lora_rank=4, lora_alpha=3.0, use_dora=True),
    ],
    ids=["plain", "alpha", "rslora", "dora"],
)
def test_network_equals_peft_in_output_and_gradients(options):
    network, result = attached(options)
    perturb(result.trainable)
    theirs = tiny_chroma(torch.float64)
    config = LoraConfig(
        r=4,
        lora_alpha=options.lora_alpha or 4,
        target_modules=attention_names(theirs),
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
    )
    inject_adapter_in_model(config, theirs)
    factors = dict(result.trainable)
    with torch.no_grad():
        other = {
            name.replace(".default", "").replace("vector.weight", "vector"): parameter
            for name, parameter in theirs.named_parameters()
            if "lora_" in name
        }
        assert other.keys() == factors.keys()
        for name, parameter in other.items():
            parameter.copy_(factors[name])
    a, b = run_forward(network, torch.float64), run_forward(theirs, torch.float64)
    assert (a - b).abs().max() < 1e-12
    a.square().sum().backward()
    b.square().sum().backward()
    for name, parameter in other.items():
        assert torch.allclose(factors[name].grad, parameter.grad, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "dora"), [("default", False), ("default", True), ("olora", False), ("pissa", False)]
)
def test_step_zero_and_strength_zero_are_the_base(kind, dora, dtype):
    base = run_forward(tiny_chroma(dtype), dtype)
    network = tiny_chroma(dtype)
    options = AdapterOptions(lora_rank=4, lora_init_type=kind, use_dora=dora)
    result = attach_adapter(network, options, attention_names(network), 5)
    close = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 0.02}
    assert torch.allclose(run_forward(network, dtype), base, **close)
    perturb(result.trainable)
    moved = run_forward(network, dtype)
    assert not torch.allclose(moved, base, **close)
    set_strength(network, 0.0)
    assert torch.equal(run_forward(network, dtype), base)
    set_strength(network, 1.0)
    assert torch.equal(run_forward(network, dtype), moved)


@pytest.mark.parametrize("kind", ["olora", "pissa"])
def test_principal_starts_train_as_peft_trains_them(kind):
    """PEFT subtracts the start from the base, we keep the base: function and gradients are the
    same.
    """
    torch.manual_seed(0)
    linear = nn.Linear(24, 40).double()
    ours, theirs = nn.Sequential(linear), nn.Sequential(nn.Linear(24, 40))
    theirs[0].load_state_dict(linear.state_dict())
    options = AdapterOptions(lora_rank=4, lora_alpha=6.0, lora_init_type=kind)
    result = attach_adapter(ours, options, ["0"], 5, torch.float64)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=kind)
    inject_adapter_in_model(config, theirs)  # PEFT computes the start in float32
    theirs.double()
    mine, other = adapted_modules(ours)["0"], theirs[0]
    down, up = other.lora_A["default"].weight, other.lora_B["default"].weight
    # our singular vectors are randomised, theirs exact; a start need not be more than near
    assert (mine.up @ mine.down - up @ down).norm() < (0.02 if kind == "pissa" else 1e-5) * (
        up @ down
    ).norm()
    with torch.no_grad():
        down.data, up.data = mine.down.detach().clone(), mine.up.detach().clone()
        other.base_layer.weight.data = linear.weight - mine.scale * up @ down
    x = torch.randn(9, 24, dtype=torch.float64)
    for step in range(3):
        for network, factors in ((ours, [p for _, p in result.trainable]), (theirs, [down, up])):
            gradients = torch.autograd.grad(network(x).square().sum(), factors)
            with torch.no_grad():
                for factor, gradient in zip(factors, gradients):
                    factor.sub_(1e-3 * gradient)
        assert torch.allclose(ours(x), theirs(x), rtol=1e-9, atol=1e-10), step
    assert not torch.allclose(ours(x), linear(x))
    merged = linear.weight + mine.output_terms(torch.eye(24, dtype=torch.float64))[0]
    merged = merged + mine.output_terms(torch.eye(24, dtype=torch.float64))[1]
    assert torch.allclose(nn.functional.linear(x, merged, linear.bias), ours(x))


@pytest.mark.parametrize(
    ("other", "told"),
    [({"use_dora": True}, "lora_init_type"), ({"init_lora": "x"}, "init_lora")],
    ids=str,
)
def test_what_a_principal_start_does_not_go_with_is_told_before_anything_is_read(other, told):
    for kind in ("olora", "pissa", "default"):
        run_config = RunConfig(adapter=AdapterOptions(lora_init_type=kind, **other))
        assert (told in {name for name, _ in find_errors(run_config, {})}) == (kind != "default")


def test_refusals():
    network = tiny_chroma()
    with pytest.raises(ConfigError, match="lora_rank <= "):
        attach_adapter(
            tiny_chroma(), AdapterOptions(lora_init_type="olora", lora_rank=64), ["proj_out"], 0
        )
    with pytest.raises(ModelError, match="no nowhere"):
        attach_adapter(network, AdapterOptions(), ["nowhere"], 0)
    attach_adapter(network, AdapterOptions(), ["proj_out"], 0)
    with pytest.raises(ModelError, match="already"):
        attach_adapter(network, AdapterOptions(), ["proj_out"], 0)

"""Learning rates by module: groups of parameters, their steps and their saved state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.adapters.attachment import attach_adapter
from simpletuner.config.load import try_load_mapping
from simpletuner.config.schema import AdapterOptions, OptimizerOptions
from simpletuner.errors import ConfigError
from simpletuner.models.registry import get_family
from simpletuner.training.checkpoint import flatten_optimizer, unflatten_optimizer
from simpletuner.training.independent_parameter_optimizer import IndependentParameterOptimizer
from simpletuner.training.optimizer_step import SingleParameterStepper
from simpletuner.training.optimizers import OPTIMIZERS, build_optimizer, set_optimizer_mode
from simpletuner.training.parameter_groups import load_grouped_state, rate_factors, set_rate

SHAPES = {"a.weight": (4, 9), "b.weight": (7, 4), "b.bias": (7,), "c.weight": (3, 5)}
FACTORS = {"b.weight": 0.5, "b.bias": 0.5, "c.weight": 2.0}
SEVERAL_RATES = [name for name in OPTIMIZERS if name != "prodigy"]
RATE = 0.01


def parameters(names: tuple[str, ...] = tuple(SHAPES)) -> list[tuple[str, nn.Parameter]]:
    params = []
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(len(name) + shape[0])
        params.append((name, nn.Parameter(torch.randn(shape, generator=generator))))
    return [(name, param) for name, param in params if name in names]


def build(name: str, params, factors=None):
    options = OptimizerOptions(optimizer=name, learning_rate=RATE)
    return build_optimizer(options, params, 3, factors or {})


def set_gradients(params, number: int) -> None:
    for name, param in params:
        generator = torch.Generator().manual_seed(1000 * number + len(name) + param.shape[0])
        param.grad = torch.randn(param.shape, generator=generator)


def run_steps(params, optimizer, numbers, rate: float = RATE, single: bool = False) -> None:
    for number in numbers:
        set_rate(optimizer, rate * (1 + number))
        set_gradients(params, number)
        if single:
            stepper = SingleParameterStepper(optimizer, None)
            for _, param in params:
                stepper.step(param)
            stepper.finish_step()
        else:
            optimizer.step()


@pytest.mark.parametrize("name", SEVERAL_RATES)
def test_each_group_is_trained_as_it_would_be_alone_at_its_rate(name: str) -> None:
    params = parameters()
    optimizer = build(name, params, FACTORS)
    run_steps(params, optimizer, range(4))
    set_optimizer_mode(optimizer, training=False)
    for factor, names in {
        1.0: ("a.weight",),
        0.5: ("b.weight", "b.bias"),
        2.0: ("c.weight",),
    }.items():
        alone = parameters(names)
        other = build(name, alone)
        if isinstance(optimizer, IndependentParameterOptimizer):  # the address of its rounding
            positions = {key: optimizer.parameter_index[param] for key, param in params}
            other.parameter_index = {param: positions[key] for key, param in alone}
        run_steps(alone, other, range(4), RATE * factor)
        set_optimizer_mode(other, training=False)
        found = dict(params)
        for key, param in alone:
            assert torch.equal(found[key], param), (factor, key)


@pytest.mark.parametrize("name", SEVERAL_RATES)
def test_single_parameters_are_stepped_in_their_groups(name: str) -> None:
    together, one_by_one = parameters(), parameters()
    first, second = build(name, together, FACTORS), build(name, one_by_one, FACTORS)
    run_steps(together, first, range(3))
    run_steps(one_by_one, second, range(3), single=True)
    for (key, param), (_, other) in zip(together, one_by_one):
        assert torch.equal(param, other), key
    assert [len(group["params"]) for group in second.param_groups] == [1, 2, 1]


@pytest.mark.parametrize("name", SEVERAL_RATES)
def test_a_saved_state_continues_exactly(name: str) -> None:
    params = parameters()
    optimizer = build(name, params, FACTORS)
    run_steps(params, optimizer, range(3))
    saved = [(key, nn.Parameter(param.detach().clone())) for key, param in params]
    resumed = build(name, saved, FACTORS)
    tensors, rest = flatten_optimizer(optimizer.state_dict())
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    load_grouped_state(resumed, unflatten_optimizer(tensors, rest, resumed.state_dict()))
    run_steps(params, optimizer, range(3, 6))
    run_steps(saved, resumed, range(3, 6))
    for (key, param), (_, other) in zip(params, saved):
        assert torch.equal(param, other), key


def test_a_state_of_other_groups_is_refused_and_new_factors_are_kept() -> None:
    params = parameters()
    optimizer = build("adamw", params, FACTORS)
    run_steps(params, optimizer, range(1))
    state = optimizer.state_dict()
    for factors in ({}, {"a.weight": 0.5, "b.weight": 2.0}, {"b.weight": 0.5, "c.weight": 2.0}):
        with pytest.raises(ValueError, match="in another way"):
            load_grouped_state(build("adamw", parameters(), factors), state)
    changed = {name: factor * 3 for name, factor in FACTORS.items()}
    other = build("adamw", parameters(), changed)
    load_grouped_state(other, state)
    set_rate(other, 0.1)
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0.1, 0.15, 0.6])


def test_without_factors_there_is_one_group_as_before() -> None:
    params = parameters()
    for factors in ({}, dict.fromkeys(SHAPES, 1.0)):
        (group,) = build("adamw", params, factors).param_groups
        assert "lr_factor" not in group
        assert "members" not in group


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.last = nn.Linear(8, 8)


def adapted(options: AdapterOptions) -> tuple[Network, list[str]]:
    network = Network()
    names = get_family("chroma").lora_conventions.names
    attached = attach_adapter(network, options, ["blocks.0", "blocks.1", "last"], 0, names)
    return network, [name for name, _ in attached.trainable]


def test_factors_are_by_module_and_by_the_first_pattern() -> None:
    network, names = adapted(AdapterOptions(lora_rank=2, use_dora=True))
    options = OptimizerOptions(
        lr_by_module={r"blocks\.0": 0.5, r"blocks\..*": 2}, loraplus_lr_ratio=16
    )
    assert rate_factors(options, network, names) == {
        "blocks.0.lora_A.weight": 0.5,
        "blocks.0.lora_B.weight": 8.0,
        "blocks.0.lora_magnitude_vector": 0.5,
        "blocks.1.lora_A.weight": 2.0,
        "blocks.1.lora_B.weight": 32.0,
        "blocks.1.lora_magnitude_vector": 2.0,
        "last.lora_A.weight": 1.0,
        "last.lora_B.weight": 16.0,
        "last.lora_magnitude_vector": 1.0,
    }


def test_factors_of_a_network_trained_at_full_rank() -> None:
    network = Network()
    names = [name for name, _ in network.named_parameters()]
    factors = rate_factors(OptimizerOptions(lr_by_module={"last": 0.1}), network, names)
    assert {name: factor for name, factor in factors.items() if factor != 1} == {
        "last.weight": 0.1,
        "last.bias": 0.1,
    }


@pytest.mark.parametrize(
    ("patterns", "part"),
    [
        ({"block.0": 0.5}, "no trained module is matched by 'block.0'"),
        ({"(blocks.0": 0.5}, "is not a regular expression"),
    ],
)
def test_a_pattern_without_a_module_is_refused(patterns: dict[str, float], part: str) -> None:
    network, names = adapted(AdapterOptions(lora_rank=2))
    with pytest.raises(ConfigError, match=part.replace("(", r"\(")):
        rate_factors(OptimizerOptions(lr_by_module=patterns), network, names)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"lr_by_module": {"(": 1}}, "lr_by_module: '(' is not a regular expression"),
        ({"lr_by_module": {"a": 0}}, "lr_by_module: 'a': 0: must be greater than 0"),
        ({"lr_by_module": {"a": 1}, "optimizer": "prodigy"}, "prodigy estimates one rate"),
        ({"loraplus_lr_ratio": 4, "optimizer": "prodigy"}, "prodigy estimates one rate"),
        ({"loraplus_lr_ratio": 4, "model_type": "full"}, 'needs model_type "lora"'),
        (
            {"lr_by_module": {"a": 1}, "deepspeed_config": {"zero_optimization": {"stage": 2}}},
            "has one rate",
        ),
    ],
)
def test_what_cannot_go_together_is_refused_by_name(
    options: dict[str, object], part: str, tmp_path
) -> None:
    problems = [str(problem) for problem in try_load_mapping(options, tmp_path).problems]
    assert any(part in problem for problem in problems), problems

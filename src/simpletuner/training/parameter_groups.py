"""Learning rates of their own for some modules: the groups of parameters of an optimizer.

A group is made for each factor on the learning rate, in the order of the parameters. The factor is
a part of the group; the loop multiplies the rate of each step by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from simpletuner.adapters.adapted_linear import adapted_modules
from simpletuner.adapters.layouts import UP_SUFFIX
from simpletuner.config.patterns import match_patterns
from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import ConfigError

FACTOR = "lr_factor"
MEMBERS = "members"  # a hash of the names of a group's parameters


def rate_factors(
    options: OptimizerOptions, transformer: nn.Module, trainable: Iterable[str]
) -> dict[str, float]:
    """Return the factor on the learning rate of each trained parameter, by name.

    lr_by_module is read by the names of modules in the transformer. With loraplus_lr_ratio the
    factors B of a LoRA have that many times the rate of A (LoRA+, Hayou et al. 2024,
    arXiv 2402.12354). Raises ConfigError for an expression that no trained module matches.
    """
    modules = set(adapted_modules(transformer))
    module_of = {name: _module_of(name, modules) for name in trainable}
    try:
        factors, unused = match_patterns(
            options.lr_by_module or {}, list(dict.fromkeys(module_of.values()))
        )
    except ValueError as error:
        raise ConfigError(f"lr_by_module: {error}") from error
    if unused:
        example = next(iter(module_of.values()))
        raise ConfigError(
            f"lr_by_module: no trained module is matched by {unused[0]!r}, which must match the "
            f"whole name of a module such as {example}"
        )
    ratio = options.loraplus_lr_ratio or 1.0
    return {
        name: factors.get(module, 1.0) * (ratio if name == f"{module}{UP_SUFFIX}" else 1.0)
        for name, module in module_of.items()
    }


def _module_of(parameter: str, adapted: set[str]) -> str:
    """Return the adapted linear that a parameter belongs to, else the module that holds it."""
    module = parameter.rpartition(".")[0]
    parent = module
    while parent:
        if parent in adapted:
            return parent
        parent = parent.rpartition(".")[0]
    return module


def group_parameters(
    params: Sequence[tuple[str, nn.Parameter]], factors: Mapping[str, float]
) -> list[Any]:
    """Return what an optimizer takes: the parameters, or groups of them where rates differ."""
    if all(factors.get(name, 1.0) == 1.0 for name, _ in params):
        return [param for _, param in params]
    members: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, param in params:
        members.setdefault(factors.get(name, 1.0), []).append((name, param))
    return [
        {
            "params": [param for _, param in group],
            FACTOR: factor,
            MEMBERS: _hash_names(name for name, _ in group),
        }
        for factor, group in members.items()
    ]


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of a step in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(FACTOR, 1.0)


def load_grouped_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a state_dict and keep the factors of the configuration.

    Raises ValueError where the saved groups have other parameters: their states are found by
    position.
    """
    own = optimizer.param_groups
    stored = saved["param_groups"]
    if [group.get(MEMBERS) for group in own] != [group.get(MEMBERS) for group in stored]:
        raise ValueError("lr_by_module or loraplus_lr_ratio divides the parameters in another way")
    factors = [group.get(FACTOR) for group in own]
    optimizer.load_state_dict(dict(saved))
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        if factor is not None:
            group[FACTOR] = factor


def _hash_names(names: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()

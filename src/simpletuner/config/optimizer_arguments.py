"""Arguments that `optimizer_config` may give each optimizer, and the parser of its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from simpletuner.config.sections_training import OptimizerOptions
from simpletuner.errors import ConfigError


def _parse_bool(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


ARGUMENT_PARSERS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    "adamw": {"amsgrad": _parse_bool},
    "adamw_bf16": {},
    "adamw_8bit": {},
    "adafactor": {"beta2_decay": float, "d": float, "eps1": float, "eps2": float},
    "lion": {"beta1": float, "beta2": float, "decouple_lr": _parse_bool, "kahan_sum": _parse_bool},
    "prodigy": {
        "beta3": float,
        "d0": float,
        "d_coef": float,
        "decouple": _parse_bool,
        "growth_rate": float,
        "safeguard_warmup": _parse_bool,
        "slice_p": int,
        "use_bias_correction": _parse_bool,
    },
    "adamw_schedulefree": {"r": float, "weight_lr_power": float},
    "muon": {"momentum": float, "iterations": int},
}


def parse_optimizer_arguments(options: OptimizerOptions) -> dict[str, Any]:
    """Return optimizer_config as typed arguments.

    Raises ConfigError that lists the keys of this optimizer.
    """
    known = ARGUMENT_PARSERS[options.optimizer]
    arguments: dict[str, Any] = {}
    for item in filter(
        None, (part.strip() for part in (options.optimizer_config or "").split(","))
    ):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or key not in known:
            raise ConfigError(
                f"{item!r} is not an argument of {options.optimizer}; "
                f"it takes {', '.join(f'{name}=...' for name in known) or 'no further arguments'}"
            )
        try:
            arguments[key] = known[key](text)
        except (ValueError, KeyError) as error:
            kind = "true or false" if known[key] is _parse_bool else "a number"
            raise ConfigError(f"{key} = {text!r} is not {kind}") from error
    return arguments

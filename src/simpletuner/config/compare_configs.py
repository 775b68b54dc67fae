"""Comparison of two configurations: whether a checkpoint of one may be resumed with the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from simpletuner.config.option_catalog import all_options


def training_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line per option whose difference would change the training.

    For example "learning_rate was 0.0001, is 0.0002". Options declared free on resume are left out;
    an option that one side does not know, because another version wrote it, counts as its default.
    """
    was, now = _options_fixed_on_resume(old), _options_fixed_on_resume(new)
    differing = [name for name in now if was[name] != now[name]]
    return [f"{name} was {json.dumps(was[name])}, is {json.dumps(now[name])}" for name in differing]


def training_config_hash(resolved: Mapping[str, Any], micro_batches: int) -> str:
    """Return 16 hex digits that change with every option that would change the training.

    micro_batches: of one optimizer step, over all processes, however they are divided.
    """
    fixed = {**_options_fixed_on_resume(resolved), "gradient_accumulation_steps": micro_batches}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def _options_fixed_on_resume(resolved: Mapping[str, Any]) -> dict[str, Any]:
    return {
        option.name: resolved.get(option.name, option.default)
        for option in all_options().values()
        if option.resume_policy == "fixed"
    }

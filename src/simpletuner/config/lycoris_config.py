"""The options in lycoris_config by LyCORIS' names: LoHa or LoKr, its size and strength."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.bounded_files import read_bounded_text
from simpletuner.config.sections_model import AdapterOptions
from simpletuner.errors import ConfigError

ALGOS = ("lokr", "loha")
MAX_FILE_BYTES = 1 << 20
UNUSED_DEFAULT_PATH = "config/lycoris_config.json"  # saved by web forms that use none
EXAMPLE_CONFIG = '{"algo": "lokr", "linear_dim": 16, "linear_alpha": 16}'
# Key -> values that ask for what happens anyway, and why no other is taken.
FIXED_KEYS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "multiplier": ((1, None), "strength is linear_alpha / linear_dim"),
    "apply_preset": (({}, None), "choose modules by flux_lora_target or lora_target_modules"),
    "dropout": ((0, None), "use lora_dropout"),
    "rank_dropout": ((0, None), "use lora_dropout"),
    "module_dropout": ((0, None), "use lora_dropout"),
    "weight_decompose": ((False, None), "programs scale LyCORIS' magnitudes differently"),
    "use_scalar": ((False, None), "it starts the same delta in another way"),
    "rs_lora": ((False, None), "raise linear_alpha"),
    "unbalanced_factorization": ((False, None), "it is not supported"),
    "use_tucker": ((False, True, None), ""),  # of convolutions alone, as the two below
    "conv_dim": ((), ""),
    "conv_alpha": ((), ""),
    "bypass_mode": ((False, True, None), ""),
}


@dataclass(frozen=True)
class LycorisConfig:
    """Settings of a LoHa or LoKr. dim: LoHa's rank, and that of LoKr's pairs.

    alpha: the strength is alpha / dim. factor: rows and columns of LoKr's w1, as near as they
    divide; -1 is near the square root. full_matrix: do not decompose w2, whatever dim is.
    decompose_both: decompose w1 too where dim is small.
    """

    algo: str
    dim: int
    alpha: float
    factor: int = -1
    full_matrix: bool = False
    decompose_both: bool = False


def require_lycoris_config(options: AdapterOptions) -> LycorisConfig:
    """Return the LyCORIS settings of a run with lora_type "lycoris"."""
    if not isinstance(options.lycoris_config, dict):
        raise ConfigError(f'lora_type "lycoris" needs a file or an object such as {EXAMPLE_CONFIG}')
    return parse_lycoris_config(options.lycoris_config)


def describe_adapter(options: AdapterOptions) -> str:
    """Return "rank 16 LoRA" or "LoKr (linear_dim 16)"."""
    if options.lora_type == "standard":
        return f"rank {options.lora_rank} {'DoRA' if options.use_dora else 'LoRA'}"
    config = require_lycoris_config(options)
    return f"{'LoKr' if config.algo == 'lokr' else 'LoHa'} (linear_dim {config.dim})"


def parse_lycoris_config(config: Mapping[str, Any]) -> LycorisConfig:
    """Parse the object. Raises ConfigError with the first thing that is not allowed."""
    own = {"algo", "linear_dim", "linear_alpha", "factor", "full_matrix", "decompose_both"}
    for key, value in config.items():
        if key in FIXED_KEYS and FIXED_KEYS[key][1] and value not in FIXED_KEYS[key][0]:
            raise ConfigError(f"{key} = {json.dumps(value)} is not supported: {FIXED_KEYS[key][1]}")
        if key not in FIXED_KEYS and key not in own:
            raise ConfigError(f"{key}: unknown; it takes {', '.join(sorted(own))}")
    algo, dim, factor = config.get("algo"), config.get("linear_dim", 16), config.get("factor", -1)
    if algo in ("lora", "locon"):
        raise ConfigError(
            'algo "lora" is a LoRA: use lora_type "standard" with lora_rank and lora_alpha'
        )
    if algo not in ALGOS:
        raise ConfigError(
            f"algo = {json.dumps(algo)} is not supported; allowed: {', '.join(ALGOS)}"
        )
    alpha = config.get("linear_alpha") or dim
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in (dim, factor))
    if not whole or not 1 <= dim <= 1_000_000 or not (factor == -1 or 1 <= factor <= 1024):
        raise ConfigError(
            "linear_dim must be a whole number from 1, factor one from 1 to 1024 or -1"
        )
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= 1_000_000:
        raise ConfigError(f"linear_alpha = {json.dumps(alpha)} is not a number above 0")
    flags = [config.get(name, False) for name in ("full_matrix", "decompose_both")]
    if not all(isinstance(flag, bool) for flag in flags):
        raise ConfigError("full_matrix and decompose_both must be true or false")
    if algo == "loha" and ("factor" in config or any(flags) or dim > 8192):
        raise ConfigError(
            "loha takes only linear_dim up to 8192 and linear_alpha; the other keys are for lokr"
        )
    return LycorisConfig(algo, dim, float(alpha), factor, *flags)


def read_lycoris_file(path: str) -> dict[str, Any]:
    """Return the object in a file, unchecked; see `parse_lycoris_config`."""
    try:
        config = json.loads(read_bounded_text(Path(path), MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold one object, {{...}}")
    return config

"""Endings of keys in LoRA files of all trainers, by the form of the delta that they hold."""

from __future__ import annotations

from collections.abc import Mapping

# Form of a pair of factors -> endings of the keys of A and B.
PAIR_FORMS: Mapping[str, tuple[str, str]] = {
    "lora_down/up": (".lora_down.weight", ".lora_up.weight"),
    "lora_A/B": (".lora_A.weight", ".lora_B.weight"),
    "lora_A/B.default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "lora_A/B without .weight": (".lora_A", ".lora_B"),
    ".lora.down/up": (".lora.down.weight", ".lora.up.weight"),
    "_lora.down/up": ("_lora.down.weight", "_lora.up.weight"),
    "lora_linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}
# Form of other deltas -> endings of its keys.
OTHER_FORMS: Mapping[str, tuple[str, ...]] = {
    "LoHa": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"),
    "LoKr": (
        ".lokr_w1",
        ".lokr_w2",
        *(f".lokr_w{number}_{letter}" for number in "12" for letter in "ab"),
        ".lokr_t2",
    ),
    "OFT": (".oft_blocks", ".oft_diag", ".oft_R.weight", ".rescale"),
    "full delta": (".diff", ".diff_b", ".w_norm", ".b_norm"),
    "whole weight": (".set_weight",),
}
# Endings that belong to a delta and are none: scale, magnitude, convolution core.
ATTACHED = (
    ".alpha",
    ".dora_scale",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_mid.weight",
    ".reshape_weight",
)

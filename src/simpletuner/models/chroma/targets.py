"""Which modules a preset adapts: never the approximator, the embedders or the final proj_out."""

from __future__ import annotations

from torch import nn

from simpletuner.errors import ConfigError

TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", *TEXT_ATTENTION)
TEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", *TEXT_FEED_FORWARD, "proj_mlp", "proj_out")
SUFFIXES = {
    "all": ATTENTION,
    "context": TEXT_ATTENTION,
    "context+ffs": (*TEXT_ATTENTION, *TEXT_FEED_FORWARD),
    "all+ffs": (*ATTENTION, *FEED_FORWARD),
}
SINGLES = {
    "tiny": ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"),
    "nano": ("single_transformer_blocks.7.proj_out",),
}
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


def lora_targets(transformer: nn.Module, preset: str) -> list[str]:
    """Full module names in the network's order; ConfigError when the preset means nothing here."""
    names = [name for name, _ in transformer.named_modules() if name.startswith(BLOCKS)]
    if preset in SUFFIXES:
        endings = tuple(f".{suffix}" for suffix in SUFFIXES[preset])
        return [name for name in names if name.endswith(endings)]
    if preset not in SINGLES:
        known = ", ".join([*SUFFIXES, *SINGLES])
        raise ConfigError(
            f'flux_lora_target "{preset}" names modules that Chroma does not have. Use one of {known},'
            " or lora_target_modules."
        )
    absent = [name for name in SINGLES[preset] if name not in names]
    if absent:
        raise ConfigError(
            f'flux_lora_target "{preset}" adapts {", ".join(SINGLES[preset])}; this transformer has no'
            f' {", ".join(absent)}. Use "all".'
        )
    return list(SINGLES[preset])

"""Facts of the model families that must be known without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

DEFAULT_FAMILY = "chroma"
# Bucket sides are multiples of it.
BUCKET_ALIGNMENT_PX: Mapping[str, int] = MappingProxyType({"chroma": 64})

# Names that apply_preset in lycoris_config may give to groups of linears: the classes of diffusers.
LYCORIS_CLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "chroma": (
            "Attention",
            "FeedForward",
            "ChromaTransformerBlock",
            "ChromaSingleTransformerBlock",
        )
    }
)
# Classes of other models' networks, by patterns in their names, and the classes that do the same
# here; the first that matches counts.
_ALL_BLOCKS = ("ChromaTransformerBlock", "ChromaSingleTransformerBlock")
FOREIGN_LYCORIS_CLASSES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "chroma": {
            "Parallel.*Attention|Single.*Block": ("ChromaSingleTransformerBlock",),
            "Attention|Attn": ("Attention",),
            "FeedForward|FFN|MLP|Mlp": ("FeedForward",),
            "Block|Layer": _ALL_BLOCKS,
            "Model$": _ALL_BLOCKS,
        }
    }
)
DEFAULT_LYCORIS_CLASSES = ("Attention",)  # of a preset that chooses no modules

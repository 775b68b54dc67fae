"""The fields of a Chroma transformer's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from simpletuner.errors import ModelError

CLASS_NAME = "ChromaTransformer2DModel"
MAX_LAYERS = 1000  # a config that asks for a billion layers is refused instead of built
# Fields in the config.json of every published Chroma that diffusers ignores as well.
IGNORED_FLUX_FIELDS = {"guidance_embeds": False, "pooled_projection_dim": 768}


@dataclass(frozen=True)
class TransformerConfig:
    """Fields of a transformer's config.json; the defaults are Chroma 1 (8.9 B parameters)."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    approximator_num_channels: int = 64
    approximator_hidden_dim: int = 5120
    approximator_layers: int = 5

    @property
    def width(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    @property
    def modulation_count(self) -> int:
        """3 vectors per single block, 6 per stream of a double block, 2 for the output norm."""
        return 3 * self.num_single_layers + 12 * self.num_layers + 2

    @classmethod
    def from_dict(cls, raw: Mapping[str, object], where: str) -> TransformerConfig:
        """Check a parsed config.json. Raises ModelError with the fields that are not Chroma's."""
        if raw.get("_class_name", CLASS_NAME) != CLASS_NAME:
            raise ModelError(
                f"{where}: _class_name is {raw['_class_name']!r}; Chroma's is {CLASS_NAME}."
            )
        names = {field.name for field in fields(cls)}
        unexpected = {key for key in raw.keys() - names if not key.startswith("_")}
        unknown = sorted(
            key for key in unexpected if (key, raw[key]) not in IGNORED_FLUX_FIELDS.items()
        )
        if unknown:
            raise ModelError(
                f"{where}: unknown fields for Chroma's transformer: {', '.join(unknown)}."
            )
        values = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in raw.items()
            if key in names
        }
        for key, value in values.items():
            is_axes = isinstance(value, tuple) and all(isinstance(axis, int) for axis in value)
            maximum = MAX_LAYERS if "layers" in key else 2**20
            is_valid = isinstance(value, int) and 0 < value <= maximum
            is_valid = is_valid or (key == "out_channels" and value is None)
            if not (is_axes if key == "axes_dims_rope" else is_valid):
                raise ModelError(
                    f"{where}: {key} = {raw[key]!r} is not valid for Chroma's transformer."
                )
        config = cls(**values)  # type: ignore[arg-type]
        if config.patch_size != 1 or config.out_channels not in (None, config.in_channels):
            raise ModelError(
                f"{where}: Chroma has patch_size 1 and as many output channels as input channels."
            )
        if (
            sum(config.axes_dims_rope) != config.attention_head_dim
            or len(config.axes_dims_rope) != 3
        ):
            raise ModelError(
                f"{where}: the three axes_dims_rope must add up to attention_head_dim."
            )
        return config

"""Chroma's modules under native names (the author's, ComfyUI's, kohya's) and diffusers' names.

linear2 and proj_out both read [attention | mlp], so columns are the same on both sides.
"""

from __future__ import annotations

from types import MappingProxyType

from simpletuner.adapters.module_names import ModuleNames, NativeModule

QKV_RATIOS = (1, 1, 1)  # q, k and v have as many rows as the model is wide
MLP_RATIO = 4

_MODULATION = "adapts modulation layers, which Flux has but Chroma does not"

CHROMA_MODULE_NAMES = ModuleNames(
    title="Chroma",
    native_modules=MappingProxyType(
        {
            "double_blocks.{}.img_attn.qkv": NativeModule(
                (
                    "transformer_blocks.{}.attn.to_q",
                    "transformer_blocks.{}.attn.to_k",
                    "transformer_blocks.{}.attn.to_v",
                ),
                QKV_RATIOS,
            ),
            "double_blocks.{}.img_attn.proj": NativeModule(
                ("transformer_blocks.{}.attn.to_out.0",)
            ),
            "double_blocks.{}.img_mlp.0": NativeModule(("transformer_blocks.{}.ff.net.0.proj",)),
            "double_blocks.{}.img_mlp.2": NativeModule(("transformer_blocks.{}.ff.net.2",)),
            "double_blocks.{}.txt_attn.qkv": NativeModule(
                (
                    "transformer_blocks.{}.attn.add_q_proj",
                    "transformer_blocks.{}.attn.add_k_proj",
                    "transformer_blocks.{}.attn.add_v_proj",
                ),
                QKV_RATIOS,
            ),
            "double_blocks.{}.txt_attn.proj": NativeModule(
                ("transformer_blocks.{}.attn.to_add_out",)
            ),
            "double_blocks.{}.txt_mlp.0": NativeModule(
                ("transformer_blocks.{}.ff_context.net.0.proj",)
            ),
            "double_blocks.{}.txt_mlp.2": NativeModule(("transformer_blocks.{}.ff_context.net.2",)),
            "single_blocks.{}.linear1": NativeModule(
                (
                    "single_transformer_blocks.{}.attn.to_q",
                    "single_transformer_blocks.{}.attn.to_k",
                    "single_transformer_blocks.{}.attn.to_v",
                    "single_transformer_blocks.{}.proj_mlp",
                ),
                (*QKV_RATIOS, MLP_RATIO),
                last_is_flexible=True,
            ),
            "single_blocks.{}.linear2": NativeModule(("single_transformer_blocks.{}.proj_out",)),
            "img_in": NativeModule(("x_embedder",)),
            "txt_in": NativeModule(("context_embedder",)),
            "final_layer.linear": NativeModule(("proj_out",)),
        }
    ),
    modules_outside_blocks=(
        "img_in",
        "txt_in",
        "final_layer.linear",
        "x_embedder",
        "context_embedder",
        "proj_out",
    ),
    unsupported_keys=MappingProxyType(
        {
            "distilled_guidance_layer": "adapts the approximator, which breaks the model",
            "mod_lin": _MODULATION,
            "mod.lin": _MODULATION,
            "modulation": _MODULATION,
        }
    ),
)

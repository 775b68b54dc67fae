"""Chroma's files: components, key prefixes, and the kinds of single files that people have."""

from __future__ import annotations

from types import MappingProxyType

from simpletuner.models.weights import single_file
from simpletuner.models.weights.model_format import (
    ComponentFormat,
    FileKind,
    ModelFormat,
    TensorsByKey,
)

WEIGHTS_STEM = "diffusion_pytorch_model"
# llama.cpp's names of T5's modules in GGUF files -> transformers' names.
LLAMA_CPP_T5_NAMES = {
    "enc.blk.": "encoder.block.",
    "token_embd.": "shared.",
    "enc.output_norm.": "encoder.final_layer_norm.",
    ".attn_q.": ".layer.0.SelfAttention.q.",
    ".attn_k.": ".layer.0.SelfAttention.k.",
    ".attn_v.": ".layer.0.SelfAttention.v.",
    ".attn_o.": ".layer.0.SelfAttention.o.",
    ".attn_norm.": ".layer.0.layer_norm.",
    ".attn_rel_b.": ".layer.0.SelfAttention.relative_attention_bias.",
    ".ffn_gate.": ".layer.1.DenseReluDense.wi_0.",
    ".ffn_up.": ".layer.1.DenseReluDense.wi_1.",
    ".ffn_down.": ".layer.1.DenseReluDense.wo.",
    ".ffn_norm.": ".layer.1.layer_norm.",
}


def rename_llama_cpp_keys(tensors: TensorsByKey) -> TensorsByKey:
    """Return T5's tensors under transformers' names, if they have llama.cpp's."""
    if not any(key.startswith("enc.blk.") for key in tensors):
        return tensors
    return {_transformers_key(key): stored for key, stored in tensors.items()}


def _transformers_key(key: str) -> str:
    for llama_cpp, transformers in LLAMA_CPP_T5_NAMES.items():
        key = key.replace(llama_cpp, transformers)
    return key


CHROMA_FORMAT = ModelFormat(
    title="Chroma",
    components=MappingProxyType(
        {
            "transformer": ComponentFormat(
                title="Chroma's transformer",
                weights_stem=WEIGHTS_STEM,
                key_prefixes=("model.diffusion_model.", "diffusion_model."),
            ),
            "vae": ComponentFormat(
                title="Flux's VAE",
                weights_stem=WEIGHTS_STEM,
                key_prefixes=("first_stage_model.", "vae."),
            ),
            "text_encoder": ComponentFormat(
                title="a T5 encoder",
                weights_stem="model",
                key_prefixes=("text_encoders.t5xxl.transformer.",),
                rename_keys=rename_llama_cpp_keys,
            ),
        }
    ),
    file_kinds=(
        single_file.LORA_FILE,
        FileKind("Chroma Radiance, which works on pixels without a VAE", "", ("\nnerf_",)),
        FileKind("Chroma's transformer", "transformer", ("\ndistilled_guidance_layer.",)),
        single_file.STABLE_DIFFUSION_3_FILE,
        FileKind(
            "a Flux transformer", "", ("\ndouble_blocks.0.img_mod.", ".0.norm1_context.linear.")
        ),
        single_file.STABLE_DIFFUSION_XL_FILE,
        single_file.STABLE_DIFFUSION_1_FILE,
        FileKind(
            "a T5 encoder",
            "text_encoder",
            (
                "encoder.block.0.layer.0.SelfAttention.",
                "\nshared.weight\n",
                "\nenc.blk.0.",
            ),
        ),
        single_file.CLIP_FILE,
        FileKind("a VAE", "vae", ("\ndecoder.conv_in.", "\nencoder.conv_in.")),
    ),
)

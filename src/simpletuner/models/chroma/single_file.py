"""Single weight files: recognize the model, rename its tensors, and infer its config.

A diffusers folder has a config.json; the config of a single file is inferred from the shapes of its
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from simpletuner.errors import ModelError
from simpletuner.models.chroma import native_names, weight_header
from simpletuner.quantization.convert import StoredTensor

# Key prefixes of a component in all-in-one checkpoints; a file of one component has none.
COMPONENT_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "text_encoder": ("text_encoders.t5xxl.transformer.",),
    "vae": ("first_stage_model.", "vae."),
}
COMPONENT_TITLES = {
    "transformer": "Chroma's transformer",
    "vae": "Flux's VAE",
    "text_encoder": "a T5 encoder",
}
# (kind of model, its component here or "", key fragments that only it has); the first match counts.
FILE_KINDS = (
    (
        "a LoRA",
        "",
        (".lora_A.", ".lora_down.", ".lora.down.", ".hada_w1_a", ".lokr_w", "lora_unet_"),
    ),
    ("Chroma Radiance, which works on pixels without a VAE", "", ("\nnerf_",)),
    ("Chroma's transformer", "transformer", ("\ndistilled_guidance_layer.",)),
    ("a Stable Diffusion 3 transformer", "", ("\njoint_blocks.0.", "\npos_embed.proj.")),
    ("a Flux transformer", "", ("\ndouble_blocks.0.img_mod.", ".0.norm1_context.linear.")),
    (
        "Stable Diffusion XL",
        "",
        ("\nlabel_emb.0.0.", "conditioner.embedders.", "\nadd_embedding.linear_1."),
    ),
    ("Stable Diffusion 1 or 2", "", ("\ninput_blocks.0.0.", "\ndown_blocks.0.resnets.")),
    (
        "a T5 encoder",
        "text_encoder",
        ("encoder.block.0.layer.0.SelfAttention.", "\nshared.weight\n", "\nenc.blk.0."),
    ),
    ("a CLIP text encoder", "", ("text_model.encoder.layers.0.",)),
    ("a VAE", "vae", ("\ndecoder.conv_in.", "\nencoder.conv_in.")),
)
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
VAE_BLOCK_PATTERN = re.compile(
    r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv1\.weight"
)


def identify_file(names: Collection[str]) -> tuple[str, str]:
    """Return (kind of model, component it can be used as or ""), such as ("a LoRA", "")."""
    text = "\n".join(["", *names, ""])
    kind_and_component = next(
        (
            (kind, component)
            for kind, component, fragments in FILE_KINDS
            if any(fragment in text for fragment in fragments)
        ),
        None,
    )
    examples = ", ".join(sorted(names)[:3])
    return kind_and_component or (f"an unknown model (it holds {examples or 'no tensors'})", "")


def read_component(file: Path, component: str) -> tuple[dict[str, StoredTensor], Mapping[str, str]]:
    """Return one component's tensors without their key prefix, and the file's metadata.

    Raises ModelError when the file holds another model.
    """
    header = weight_header.read_weight_header(file)
    prefix = _find_prefix(header.tensors, component)
    tensors = {
        name[len(prefix) :]: stored
        for name, stored in header.tensors.items()
        if name.startswith(prefix)
    }
    kind, usable_as = identify_file(tensors)
    if usable_as != component:
        raise ModelError(f"{file} is {kind}; expected {COMPONENT_TITLES[component]}.")
    if any(name.startswith("enc.blk.") for name in tensors):
        tensors = {_transformers_name(name): stored for name, stored in tensors.items()}
    return weight_header.decode_fp8_tensors(tensors, file), header.metadata


def components_in_file(file: Path) -> list[str]:
    """Return the components in a file: one, or all of an all-in-one checkpoint.

    Raises ModelError when it holds none.
    """
    names = weight_header.read_weight_header(file).tensors
    present = {
        part: any(name.startswith(COMPONENT_PREFIXES[part]) for name in names)
        for part in COMPONENT_PREFIXES
    }
    components = [part for part, is_present in present.items() if is_present]
    if present["transformer"]:
        return components
    kind, usable_as = identify_file(names)
    if not usable_as:
        raise ModelError(f"{file} is {kind}; expected {COMPONENT_TITLES['transformer']}.")
    return [usable_as]


def read_transformer(file: Path) -> dict[str, StoredTensor]:
    """Return the transformer's tensors by diffusers' names; fused native matrices are sliced."""
    tensors, _ = read_component(file, "transformer")
    if any(name.startswith(("transformer_blocks.", "x_embedder.")) for name in tensors):
        return tensors
    if "img_in.weight" not in tensors or not tensors["img_in.weight"].shape:
        raise ModelError(f"{file} is not a complete Chroma transformer: img_in.weight is missing.")
    width = tensors["img_in.weight"].shape[0]
    renamed: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        rows = stored.shape[0] if stored.shape else 1
        pieces = native_names.split_native_tensor(name, rows, width)
        renamed |= {
            piece: stored.slice_dim0(rows_of_part) if len(pieces) > 1 else stored
            for piece, rows_of_part in pieces
        }
        if not pieces:
            renamed[name] = stored  # check_tensors reports it as unexpected
    return renamed


def infer_vae_config(file: Path) -> dict[str, object]:
    """Infer diffusers' config.json of Flux's VAE, at the widths of this file."""
    tensors, _ = read_component(file, "vae")
    blocks = {
        match.groups(): tensors[match[0]]
        for match in map(VAE_BLOCK_PATTERN.fullmatch, tensors)
        if match
    }
    levels = sorted({int(level) for level, _ in blocks})
    conv_in = tensors.get("decoder.conv_in.weight")
    first_shapes = [tensor.shape for level in levels if (tensor := blocks.get((str(level), "0")))]
    widths = [shape[0] for shape in first_shapes if len(shape) == 4]
    if conv_in is None or len(conv_in.shape) != 4 or not 0 < len(widths) == len(levels) < 9:
        raise ModelError(f"{file} is not a complete VAE: some of its blocks are missing.")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "sample_size": 1024,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "block_out_channels": widths,
        "layers_per_block": len([1 for level, _ in blocks if level == "0"]),
        "norm_num_groups": 32,
        "mid_block_add_attention": True,
        "latent_channels": conv_in.shape[1],
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def infer_t5_config(file: Path) -> dict[str, object]:
    """Infer transformers' config.json of a T5 v1.1 encoder."""
    tensors, _ = read_component(file, "text_encoder")
    block = "encoder.block.0.layer"
    try:
        vocabulary, width = tensors[
            T5_EMBEDDING if T5_EMBEDDING in tensors else T5_EMBEDDING_ALIAS
        ].shape
        attention_width, _ = tensors[f"{block}.0.SelfAttention.q.weight"].shape
        buckets, heads = tensors[f"{block}.0.SelfAttention.relative_attention_bias.weight"].shape
        feed_forward_width, _ = tensors[f"{block}.1.DenseReluDense.wi_0.weight"].shape
    except (KeyError, ValueError) as error:
        raise ModelError(f"{file} is not a complete T5 v1.1 encoder: {error}.") from None
    count = len({name.split(".")[2] for name in tensors if name.startswith("encoder.block.")})
    if not heads or attention_width % heads or count > MAX_T5_BLOCKS:
        raise ModelError(
            f"{file} is not a T5 v1.1 encoder: it has {attention_width} attention columns, {heads}"
            f" heads and {count} blocks."
        )
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "is_encoder_decoder": False,
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": attention_width // heads,
        "d_ff": feed_forward_width,
        "num_layers": count,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


T5_EMBEDDING = "shared.weight"
T5_EMBEDDING_ALIAS = "encoder.embed_tokens.weight"
MAX_T5_BLOCKS = 100


def _transformers_name(name: str) -> str:
    for llama, transformers in LLAMA_CPP_T5_NAMES.items():
        name = name.replace(llama, transformers)
    return name


def _find_prefix(names: Collection[str], component: str) -> str:
    return next(
        (
            prefix
            for prefix in COMPONENT_PREFIXES[component]
            if any(name.startswith(prefix) for name in names)
        ),
        "",
    )

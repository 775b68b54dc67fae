"""One file where diffusers has a folder: which model it is, its tensors by the names used here, its config.

The config of a folder is in its config.json; of a file it is in the shapes of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from simpletuner.errors import ModelError
from simpletuner.models.chroma import native_names, weight_header
from simpletuner.quantization.convert import StoredTensor

# Where all-in-one files keep a part; what is only that part has no prefix.
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
# What a file is by names that nothing else has, in this order; the part that it serves as here, "" for none.
FILE_KINDS = (
    (
        "a LoRA",
        "",
        (".lora_A.", ".lora_down.", ".lora.down.", ".hada_w1_a", ".lokr_w", "lora_unet_"),
    ),
    ("Chroma Radiance, which draws pixels without a VAE", "", ("\nnerf_",)),
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
# llama.cpp's names of a T5's parts, as its GGUF files have them -> transformers'.
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
    """("a LoRA", ""): what a file is and which part it serves as."""
    text = "\n".join(["", *names, ""])
    found = next(
        ((kind, part) for kind, part, marks in FILE_KINDS if any(mark in text for mark in marks)),
        None,
    )
    shown = ", ".join(sorted(names)[:3])
    return found or (f"no model known here (it holds {shown or 'nothing'})", "")


def read_component(file: Path, part: str) -> tuple[dict[str, StoredTensor], Mapping[str, str]]:
    """Of one part, by their names in the file less a prefix; the metadata. ModelError for another model."""
    read = weight_header.read_weight_header(file)
    prefix = _find_prefix(read.tensors, part)
    found = {
        name[len(prefix) :]: stored
        for name, stored in read.tensors.items()
        if name.startswith(prefix)
    }
    kind, serves = identify_file(found)
    if serves != part:
        raise ModelError(f"{file} is {kind}; expected {COMPONENT_TITLES[part]}.")
    if any(name.startswith("enc.blk.") for name in found):
        found = {_transformers_name(name): stored for name, stored in found.items()}
    return weight_header.decode_fp8_tensors(found, file), read.metadata


def components_in_file(file: Path) -> list[str]:
    """The parts that a file brings: most bring one, ComfyUI's checkpoints all. ModelError where none is."""
    names = weight_header.read_weight_header(file).tensors
    held = {
        part: any(name.startswith(COMPONENT_PREFIXES[part]) for name in names)
        for part in COMPONENT_PREFIXES
    }
    whole = [part for part, has in held.items() if has]
    if held["transformer"]:
        return whole
    kind, serves = identify_file(names)
    if not serves:
        raise ModelError(f"{file} is {kind}; expected {COMPONENT_TITLES['transformer']}.")
    return [serves]


def read_transformer(file: Path) -> dict[str, StoredTensor]:
    """By diffusers' names, whichever the file has. A fused matrix is cut where it lies."""
    found, _ = read_component(file, "transformer")
    if any(name.startswith(("transformer_blocks.", "x_embedder.")) for name in found):
        return found
    if "img_in.weight" not in found or not found["img_in.weight"].shape:
        raise ModelError(f"{file} is no whole Chroma transformer: missing img_in.weight.")
    width = found["img_in.weight"].shape[0]
    result: dict[str, StoredTensor] = {}
    for name, stored in found.items():
        rows = stored.shape[0] if stored.shape else 1
        pieces = native_names.split_native_tensor(name, rows, width)
        result |= {
            piece: stored.slice_dim0(kept) if len(pieces) > 1 else stored for piece, kept in pieces
        }
        if not pieces:
            result[name] = stored  # surplus, and told as that
    return result


def infer_vae_config(file: Path) -> dict[str, object]:
    """Diffusers' config.json of Flux's VAE, at the widths of this file."""
    found, _ = read_component(file, "vae")
    blocks = {
        match.groups(): found[match[0]]
        for match in map(VAE_BLOCK_PATTERN.fullmatch, found)
        if match
    }
    levels = sorted({int(level) for level, _ in blocks})
    latents = found.get("decoder.conv_in.weight")
    firsts = [one.shape for level in levels if (one := blocks.get((str(level), "0")))]
    widths = [shape[0] for shape in firsts if len(shape) == 4]
    if latents is None or len(latents.shape) != 4 or not 0 < len(widths) == len(levels) < 9:
        raise ModelError(f"{file} is no whole VAE: its blocks are not all there.")
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
        "latent_channels": latents.shape[1],
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": "quant_conv.weight" in found,
        "use_post_quant_conv": "post_quant_conv.weight" in found,
    }


def infer_t5_config(file: Path) -> dict[str, object]:
    """Transformers' config.json of a T5 v1.1 encoder."""
    found, _ = read_component(file, "text_encoder")
    block = "encoder.block.0.layer"
    try:
        vocabulary, width = found[
            T5_EMBEDDING if T5_EMBEDDING in found else T5_EMBEDDING_ALIAS
        ].shape
        inner, _ = found[f"{block}.0.SelfAttention.q.weight"].shape
        buckets, heads = found[f"{block}.0.SelfAttention.relative_attention_bias.weight"].shape
        hidden, _ = found[f"{block}.1.DenseReluDense.wi_0.weight"].shape
    except (KeyError, ValueError) as error:
        raise ModelError(f"{file} is no whole T5 v1.1 encoder: {error}.") from None
    count = len({name.split(".")[2] for name in found if name.startswith("encoder.block.")})
    if not heads or inner % heads or count > MAX_T5_BLOCKS:
        raise ModelError(
            f"{file} is no T5 v1.1 encoder: {inner} columns, {heads} heads, {count} blocks."
        )
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "is_encoder_decoder": False,
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": hidden,
        "num_layers": count,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


T5_EMBEDDING, T5_EMBEDDING_ALIAS = "shared.weight", "encoder.embed_tokens.weight"
MAX_T5_BLOCKS = 100


def _transformers_name(name: str) -> str:
    for llama, transformers in LLAMA_CPP_T5_NAMES.items():
        name = name.replace(llama, transformers)
    return name


def _find_prefix(names: Collection[str], part: str) -> str:
    return next(
        (one for one in COMPONENT_PREFIXES[part] if any(name.startswith(one) for name in names)), ""
    )

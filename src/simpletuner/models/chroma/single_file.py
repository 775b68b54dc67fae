"""Components of Chroma in single files: tensors by diffusers' names, and inferred configs.

A diffusers folder has a config.json; the config of a single file is inferred from the shapes of its
tensors.
"""

from __future__ import annotations

import re
from pathlib import Path

from simpletuner.errors import ModelError
from simpletuner.models.chroma import native_names
from simpletuner.models.chroma.model_format import CHROMA_FORMAT
from simpletuner.models.weights.single_file import read_component
from simpletuner.quantization.stored_tensor import StoredTensor

T5_EMBEDDING = "shared.weight"
T5_EMBEDDING_ALIAS = "encoder.embed_tokens.weight"
MAX_T5_BLOCKS = 100
VAE_BLOCK_PATTERN = re.compile(
    r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv1\.weight"
)


def read_transformer(file: Path) -> dict[str, StoredTensor]:
    """Return the transformer's tensors by diffusers' names; fused native matrices are sliced."""
    tensors, _ = read_component(file, "transformer", CHROMA_FORMAT)
    if any(name.startswith(("transformer_blocks.", "x_embedder.")) for name in tensors):
        return tensors
    if "img_in.weight" not in tensors or not tensors["img_in.weight"].shape:
        raise ModelError(f"{file} is not a complete Chroma transformer: img_in.weight is missing.")
    width = tensors["img_in.weight"].shape[0]
    renamed: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        rows = stored.shape[0] if stored.shape else 1
        pieces = native_names.split_native_tensor(name, rows, width)
        if len(pieces) > 1 and not stored.shape:
            raise ModelError(
                f"{file} is not a complete Chroma transformer: {name} is one number, not a matrix."
            )
        renamed |= {
            piece: stored.slice_dim0(rows_of_part) if len(pieces) > 1 else stored
            for piece, rows_of_part in pieces
        }
        if not pieces:
            renamed[name] = stored  # check_tensors reports it as unexpected
    return renamed


def infer_vae_config(file: Path) -> dict[str, object]:
    """Infer diffusers' config.json of Flux's VAE, at the widths of this file."""
    tensors, _ = read_component(file, "vae", CHROMA_FORMAT)
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
    tensors, _ = read_component(file, "text_encoder", CHROMA_FORMAT)
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

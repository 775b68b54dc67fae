"""A complete, random, tiny Chroma in diffusers' layout: every code path of the real one in
milliseconds.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

TEXT_WIDTH = 48
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,'-!?"


def transformer_fields(width: int = 64, doubles: int = 2, singles: int = 3) -> dict[str, object]:
    """Keyword arguments of diffusers' ChromaTransformer2DModel; heads are 32 wide."""
    return {
        "num_layers": doubles,
        "num_single_layers": singles,
        "attention_head_dim": 32,
        "num_attention_heads": width // 32,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (8, 12, 12),
        "approximator_hidden_dim": 96,
        "approximator_layers": 2,
    }


def make_tokenizer(folder: Path) -> None:
    """One token per letter, T5's own ids for pad (0), </s> (1) and unknown (2); </s> ends every
    caption.
    """
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -1.0),
        *((letter, -2.0) for letter in ALPHABET),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    ).save_pretrained(folder)


def make_checkpoint(
    folder: Path, *, width: int = 64, doubles: int = 2, singles: int = 3, seed: int = 0
) -> Path:
    """Write all parts, scheduler and model_index.json; hands `folder` back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ChromaTransformer2DModel(**transformer_fields(width, doubles, singles)).save_pretrained(
            folder / "transformer"
        )
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        ).save_pretrained(folder / "vae")
        T5EncoderModel(
            T5Config(
                vocab_size=4 + len(ALPHABET), d_model=TEXT_WIDTH, d_kv=12, d_ff=64, num_layers=2, num_heads=4,
                feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
            )
        ).save_pretrained(folder / "text_encoder")  # fmt: skip
    make_tokenizer(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ChromaPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "ChromaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder

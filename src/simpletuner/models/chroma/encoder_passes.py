"""T5 and the VAE without weights, as the memory plan measures them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.fingerprints import text_encoder_dtype
from simpletuner.models.chroma.model_spec import local_component_path
from simpletuner.models.chroma.weights import read_t5_config, read_vae_config
from simpletuner.models.encoders import EncoderPass

# The published config.json files of T5 v1.1 XXL's encoder and Flux's VAE.
T5_CONFIG: Mapping[str, object] = {
    "model_type": "t5",
    "is_encoder_decoder": False,
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": False,
}
VAE_CONFIG: Mapping[str, object] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "sample_size": 1024,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def text_encoder_pass(options: ModelOptions, samples: int, rows: int) -> EncoderPass:
    """Return one layer of T5, which is all that is on the device, with a batch of captions."""
    from simpletuner.models.chroma.t5 import one_layer_encoder  # imports transformers: 4 CPU s

    path = local_component_path("text_encoder", options)
    config = T5_CONFIG if path is None else read_t5_config(path)
    dtype = text_encoder_dtype(options)
    encoder = one_layer_encoder(config, options.text_encoder_1_precision, dtype)
    width = int(str(config["d_model"]))

    def run() -> None:
        hidden = torch.empty(samples, rows, width, dtype=dtype)
        encoder(inputs_embeds=hidden, attention_mask=torch.ones(samples, rows, dtype=torch.long))

    return EncoderPass(encoder, run)


def vae_pass(
    options: ModelOptions,
    dtype: torch.dtype,
    samples: int,
    size_px: tuple[int, int],
    decodes: bool,
) -> EncoderPass:
    """Return the VAE with a batch of images, or of latents where it decodes."""
    from simpletuner.models.chroma.vae import empty_vae  # imports diffusers: 5 CPU s

    path = local_component_path("vae", options)
    config = VAE_CONFIG if path is None else read_vae_config(path)
    vae = empty_vae(config, options)
    nn.Module.to(vae, dtype)  # that of diffusers warns
    width, height = size_px

    def run() -> None:
        if decodes:
            stride = 2 ** (len(vae.config.block_out_channels) - 1)
            shape = (samples, vae.config.latent_channels, height // stride, width // stride)
            vae.decode(torch.empty(shape, dtype=dtype)).sample.float()
        else:
            vae.encode(torch.empty(samples, 3, height, width, dtype=dtype))

    return EncoderPass(vae, run)

"""A vision-language model of the real classes, with random weights, that is made in a moment."""

from __future__ import annotations

from pathlib import Path

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "photo", "disc"]
WORD, SEPARATOR = 9, 3


def write_tiny_captioner(folder: Path) -> None:
    """Write a BLIP of random weights whose bias makes it write "disc" again and again."""
    import torch
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        **sizes,
        "encoder_hidden_size": 16,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 512,
        "bos_token_id": 2,
        "sep_token_id": SEPARATOR,
        "eos_token_id": SEPARATOR,
        "pad_token_id": 0,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("predictions.bias") or name.endswith("decoder.bias"):
                parameter[WORD] = 100.0
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={word: at for at, word in enumerate(WORDS)})
    processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(processor, tokenizer).save_pretrained(folder)

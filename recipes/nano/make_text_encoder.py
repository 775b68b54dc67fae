"""Make chroma-nano's text side: a tokenizer with byte fallback and a small frozen T5 encoder.

    python recipes/nano/make_text_encoder.py --out DIR        (seconds; writes DIR/tokenizer and DIR/text_encoder)

Nothing here is trained by gradient. The tokenizer's merges are counted on drawn captions and words.txt, so
that the words of the captions are one token each; any other Unicode text falls back to letters and
bytes.
The encoder's weights are random, with one thing built in: its relative position biases let each head look
at one neighbour. Chroma gives text tokens no positions, so "red" must know its "circle" from T5
alone.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from simpletuner.randomness import seed_at
from simpletuner.validation.shapes.scenes import COLOURS, POSITION_PHRASES, SHAPES, compose_scene

SEED = 21
VOCABULARY = 1200
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
WIDTH, HEAD_WIDTH, HIDDEN, LAYERS = 256, 64, 384, 2
HEAD_OFFSETS = (-1, 1, -2, 2)  # what each head looks at, relative to the token
NEIGHBOUR_BIAS = 7.0  # bias in logits: exp(7) = 1100 against some twenty tokens at 1
NEIGHBOUR_SCALE = 0.55  # a neighbour's part in a row, against the token's own 1


def tokenizer_corpus() -> Iterator[str]:
    for number in range(4000):
        yield compose_scene(SEED, number).caption
    words = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8")
    for _ in range(20):
        yield words


def make_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over words: lower case, one token per known word, letters and then bytes for the rest."""
    scaffold = Tokenizer(models.BPE())
    normal = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    scaffold.normalizer, scaffold.pre_tokenizer = normal, split
    letters = [chr(code) for code in range(0x21, 0x7F)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 256 - len(SPECIAL_TOKENS),
        initial_alphabet=letters,
        special_tokens=[],
        show_progress=False,
    )
    scaffold.train_from_iterator(tokenizer_corpus(), trainer)
    trained = scaffold.model.__getstate__()
    return _to_fast_tokenizer(_add_byte_tokens(trained), normal, split)


def _add_byte_tokens(state: bytes) -> models.BPE:
    """The trained merges under a vocabulary whose first rows are the special tokens and the 256
    bytes.
    """
    learned = json.loads(state)
    order = sorted(learned["vocab"], key=learned["vocab"].get)
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *order]
    merges = [tuple(pair) for pair in learned["merges"]]
    return models.BPE(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges,
        unk_token="<unk>", byte_fallback=True, fuse_unk=False,
    )  # fmt: skip


def _to_fast_tokenizer(
    model: models.BPE, normal: normalizers.Normalizer, split: pre_tokenizers.PreTokenizer
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normal, split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>",
        pair="$A </s> $B </s>",
        special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))],
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=512, padding_side="right", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def make_encoder(vocabulary: int) -> T5EncoderModel:
    """T5 v1.1's encoder, frozen: rows of unit size made of the token, its neighbours and theirs."""
    config = T5Config(
        vocab_size=vocabulary, d_model=WIDTH, d_kv=HEAD_WIDTH, d_ff=HIDDEN, num_layers=LAYERS,
        num_heads=len(HEAD_OFFSETS), feed_forward_proj="gated-gelu", dropout_rate=0.0,
        tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5EncoderModel(config).eval()
    draw = torch.Generator().manual_seed(seed_at(SEED, "encoder"))
    with torch.no_grad():
        model.shared.weight.copy_(_random_normal(model.shared.weight, 1.0, draw))
        for block in model.encoder.block:
            attention, feed = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
            for quiet in (attention.q.weight, attention.k.weight):
                quiet.copy_(_random_normal(quiet, 0.15 / math.sqrt(WIDTH), draw))
            attention.v.weight.copy_(_random_normal(attention.v.weight, 1 / math.sqrt(WIDTH), draw))
            attention.o.weight.copy_(
                _random_normal(attention.o.weight, NEIGHBOUR_SCALE / math.sqrt(HEAD_WIDTH), draw)
            )
            for inner in (feed.wi_0.weight, feed.wi_1.weight):
                inner.copy_(_random_normal(inner, 1 / math.sqrt(WIDTH), draw))
            feed.wo.weight.copy_(_random_normal(feed.wo.weight, 0.3 / math.sqrt(HIDDEN), draw))
        first = model.encoder.block[0].layer[0].SelfAttention
        first.relative_attention_bias.weight.copy_(_position_biases(first))
    return model


def _random_normal(like: Tensor, deviation: float, draw: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=draw) * deviation


def _position_biases(attention: torch.nn.Module) -> Tensor:
    """(buckets, heads): ATTENDED in the bucket of the head's neighbour, else 0."""
    table = torch.zeros(attention.relative_attention_num_buckets, len(HEAD_OFFSETS))
    offsets = torch.tensor(HEAD_OFFSETS)
    buckets = attention._relative_position_bucket(
        offsets, bidirectional=True, num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )  # fmt: skip
    table[buckets, torch.arange(len(HEAD_OFFSETS))] = NEIGHBOUR_BIAS
    return table


def _set_tokenizer_class(file: Path) -> None:
    """transformers 5 writes a class name that 4.x does not know; both know this one."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make chroma-nano's tokenizer and text encoder.")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(args.out / "tokenizer")
    _set_tokenizer_class(args.out / "tokenizer" / "tokenizer_config.json")
    model = make_encoder(len(tokenizer))
    model.to(torch.bfloat16).save_pretrained(args.out / "text_encoder")
    words = [
        *COLOURS,
        *SHAPES,
        *(
            word
            for places in POSITION_PHRASES.values()
            for place in places
            for word in place.split()
        ),
    ]
    split = sorted({word for word in words if len(tokenizer(word)["input_ids"]) > 2})
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(tokenizer)} tokens, {parameters:,} parameters; in pieces: {split}")


if __name__ == "__main__":
    main()

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, T5EncoderModel

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import DataError, ModelError
from simpletuner.models.chroma import text_encoder
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.text_encoder import load_tokenizer
from simpletuner.models.encoders import TextEncoder
from simpletuner.models.family import ModelFiles

CPU = torch.device("cpu")
CAPTIONS = [
    "a cat",
    "",
    "a very long sentence about nothing at all, really: nothing.",
    "x" * 700,
    "a cat",
]


def rows_of(encoder: TextEncoder, captions: list[str]) -> list[torch.Tensor]:
    """T5's tensors; their name is that of every cache on disk."""
    embeddings = encoder.encode(captions)
    assert all(set(embedding) == {"rows"} for embedding in embeddings)
    return [embedding["rows"] for embedding in embeddings]


def load(source: ModelFiles, options: ModelOptions, **changes: object) -> TextEncoder:
    return ChromaFamily().load_text_encoder(source, options.model_copy(update=changes), CPU)


@pytest.fixture
def encoder(source: ModelFiles, options: ModelOptions) -> TextEncoder:
    return load(source, options)


def padded_to_512(checkpoint: Path, caption: str) -> tuple[torch.Tensor, int]:
    """The rows of all 512 positions with the tokenizer's own mask, and how many tokens are real."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    t5 = T5EncoderModel.from_pretrained(checkpoint / "text_encoder").eval()
    batch = tokenizer(
        caption, padding="max_length", max_length=512, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return t5(**batch).last_hidden_state[0], int(batch["attention_mask"].sum())


@pytest.mark.parametrize("caption", CAPTIONS)
def test_rows_are_those_of_the_512_padded_run(
    encoder: TextEncoder, checkpoint: Path, caption: str
) -> None:
    rows = rows_of(encoder, [caption])[0]
    expected, real = padded_to_512(checkpoint, caption)
    assert len(rows) == min(real + 1, 512)
    torch.testing.assert_close(rows, expected[: len(rows)], atol=2e-6, rtol=1e-5)


def whole_encoder_rows(checkpoint: Path, batches: list[list[str]]) -> list[torch.Tensor]:
    """Return the rows of transformers' whole encoder for the same batches, with one pad token."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    t5 = T5EncoderModel.from_pretrained(checkpoint / "text_encoder").eval()
    rows: list[torch.Tensor] = []
    for captions in batches:
        tokens = [tokenizer(text, truncation=True, max_length=512).input_ids for text in captions]
        lengths = [min(len(ids) + 1, 512) for ids in tokens]
        ids = torch.zeros(len(tokens), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(tokens):
            ids[row, : len(sample)] = torch.tensor(sample)
            mask[row, : len(sample)] = 1
        with torch.no_grad():
            hidden = t5(input_ids=ids, attention_mask=mask).last_hidden_state
        rows += [hidden[row, :length] for row, length in enumerate(lengths)]
    return rows


@pytest.mark.parametrize(
    "chunk_bytes", [1, 20_000, 10**9], ids=["one batch at a time", "two", "all"]
)
def test_layer_by_layer_equals_the_whole_encoder(
    encoder: TextEncoder, checkpoint: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whatever the number of batches that a layer is applied to."""
    monkeypatch.setitem(text_encoder.CHUNK_BYTES, "cpu", chunk_bytes)
    batches = [["", "a cat"], CAPTIONS[2:4], ["a cat", "two", "three captions"]]
    done: list[int] = []
    found = [
        embedding["rows"]
        for embeddings in encoder.encode_batches(batches, done.append)
        for embedding in embeddings
    ]
    expected = whole_encoder_rows(checkpoint, batches)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(done) == 7


def test_each_layer_is_read_once_and_alone(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weights, one layer is in memory, whatever the number of captions."""
    t5 = encoder._t5
    read: list[int] = []
    held: list[int] = []
    load, run = t5._load_layer, t5._encoder.forward

    def load_layer(number: int) -> None:
        read.append(number)
        load(number)

    def forward(**inputs: torch.Tensor) -> object:
        held.append(sum(p.nbytes for p in t5._encoder.parameters() if not p.is_meta))
        return run(**inputs)

    monkeypatch.setattr(t5, "_load_layer", load_layer)
    monkeypatch.setattr(t5._encoder, "forward", forward)
    assert len(list(encoder.encode_batches([["a cat"]] * 20))) == 20
    assert read == list(range(t5._layers))
    layer = sum(stored.size_bytes for name, stored in t5._stored.items() if ".block.1." in name)
    assert max(held) < 1.1 * layer
    assert len(held) == 20 * t5._layers
    assert all(parameter.is_meta for parameter in t5._encoder.parameters())


def test_no_caption_reads_no_layer(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder._t5, "_load_layer", None)
    assert list(encoder.encode_batches([])) == []


def test_a_batch_gives_what_each_caption_gives(encoder: TextEncoder) -> None:
    for rows, caption in zip(rows_of(encoder, CAPTIONS), CAPTIONS, strict=True):
        alone = rows_of(encoder, [caption])[0]
        assert rows.shape == alone.shape
        torch.testing.assert_close(rows, alone, atol=2e-6, rtol=1e-5)
    assert rows_of(encoder, []) == []


def test_a_cut_caption_keeps_its_end_token(encoder: TextEncoder) -> None:
    assert encoder.token_count("x" * 700) == 702
    full = rows_of(encoder, ["x" * 510])[0]
    assert encoder.token_count("x" * 510) == 512
    assert torch.equal(full, rows_of(encoder, ["x" * 700])[0])


def test_an_overlong_caption_can_be_refused(source: ModelFiles, options: ModelOptions) -> None:
    strict = load(source, options, caption_overlong="error")
    assert len(rows_of(strict, ["x" * 510])[0]) == 512
    with pytest.raises(DataError, match="702 tokens, but the limit is 512"):
        rows_of(strict, ["a cat", "x" * 700])


def test_the_limit_is_the_users_when_lower(source: ModelFiles, options: ModelOptions) -> None:
    short = load(source, options, tokenizer_max_length=16)
    assert [len(rows) for rows in rows_of(short, ["a cat", "x" * 100])] == [8, 16]


def test_zero_padding_empties_the_pad_row_only(source: ModelFiles, options: ModelOptions) -> None:
    zero, plain = load(source, options, flux_t5_padding="zero"), load(source, options)
    for caption in CAPTIONS[:3]:
        a, b = rows_of(zero, [caption])[0], rows_of(plain, [caption])[0]
        assert torch.equal(a[:-1], b[:-1])
        assert b[-1].abs().max() > 0
        assert a[-1].abs().max() == 0
    # 512 tokens leave no pad row to empty
    assert torch.equal(rows_of(zero, ["x" * 700])[0], rows_of(plain, ["x" * 700])[0])


def test_rows_come_in_half_precision_with_mixed_precision(
    source: ModelFiles, options: ModelOptions
) -> None:
    rows = rows_of(load(source, options, mixed_precision="bf16"), ["a cat"])[0]
    assert rows.dtype == torch.bfloat16
    assert rows.untyped_storage().nbytes() == rows.numel() * 2  # no view that keeps its batch alive


def test_a_folder_that_is_no_encoder_is_refused(
    source: ModelFiles, options: ModelOptions, checkpoint: Path, tmp_path: Path
) -> None:
    wrong = ModelFiles(**{**vars(source), "tokenizer": tmp_path})
    with pytest.raises(ModelError, match="does not hold a readable tokenizer"):
        load(wrong, options)
    wrong = ModelFiles(**{**vars(source), "text_encoder": tmp_path})
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load(wrong, options)


def test_a_published_tokenizer_folder_needs_no_tokenizer_json(tmp_path: Path) -> None:
    """spiece.model and a config, as beside the published Chroma; sentencepiece itself is the
    oracle.
    """
    model = io.BytesIO()
    words = [" ".join(f"{a}{b}" for b in CAPTIONS[2].split()) for a in "abcdefghijklmnopqrstuvwxyz"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    fields = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "legacy": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    tokenizer = load_tokenizer(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for caption in [
        *CAPTIONS,
        "  two  spaces ",
        "a line\nand another",
        "na\u00efve, \u201cquoted\u201d",
    ]:
        assert tokenizer(caption)["input_ids"] == [*oracle.encode(caption), 1]

"""Damaged and hostile files: a ModelError of one line, little memory, no time."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from simpletuner.errors import MissingExtra, ModelError
from simpletuner.models.chroma import single_file
from simpletuner.models.chroma.model_format import CHROMA_FORMAT
from simpletuner.models.weights import weight_header
from simpletuner.models.weights.single_file import read_component
from tests.models import single_files
from tests.quick import assert_quick

ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def safetensors(head: object, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refused(file: Path, content: bytes, said: str = "") -> None:
    file.write_bytes(content)
    tracemalloc.start()
    messages = list[str]()

    def read() -> None:
        with pytest.raises(ModelError, match=said) as caught:
            weight_header.read_weight_header(file)
        messages.append(str(caught.value))

    assert_quick(read, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in messages[0]
    assert len(messages[0]) < 600 + len(str(file))
    assert peak < 40 * len(content) + (1 << 20)


def entry(**changes: object) -> dict[str, object]:
    return {"a": ONE["a"] | changes}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (safetensors(ONE, length=2**63), "incomplete"),
        (safetensors(ONE, length=0), "damaged header"),
        (safetensors(ONE, length=3), "damaged header"),
        (safetensors(ONE, b"\0" * 7), "incomplete"),
        (safetensors(ONE, b"\0" * 9), "incomplete or"),
        (safetensors(b"{" + b"[" * 100_000), "damaged header"),
        (safetensors(b'{"a":' * 50_000 + b"}" * 50_000), "damaged header"),
        (safetensors(b'{"a":1' + b"0" * 10_000 + b"}"), "damaged header"),
        (safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],'
                     b'"data_offsets":[0,8]}}'), "twice"),
        (safetensors({str(n): entry()["a"] for n in range(20_001)}), "20,001 tensors"),
        (safetensors({**ONE, "b": ONE["a"]}), "overlap"),
        (safetensors({**ONE, "b": entry(data_offsets=[12, 20])["a"]}, b"\0" * 20), "gap"),
        (safetensors(entry(shape=[2**62, 2**62])), "does not fit"),
        (safetensors(entry(shape=[-2])), "not a whole number"),
        (safetensors(entry(shape=[2.0])), "not a whole number"),
        (safetensors(entry(shape=[True, 2])), "not a whole number"),
        (safetensors(entry(shape=[1] * 9 + [2])), "does not fit"),
        (safetensors(entry(shape="2")), "not a whole number"),
        (safetensors(entry(shape=2)), "damaged"),
        (safetensors(entry(dtype="F4")), "unsupported dtype 'F4'"),
        (safetensors(entry(dtype=["F32"])), "damaged"),
        (safetensors(entry(data_offsets=[0])), "damaged"),
        (safetensors(entry(data_offsets=[8, 0])), "does not fit"),
        (safetensors(entry(data_offsets=["0", 8])), "not a whole number"),
        (safetensors({"a": 5}), "damaged"),
        (safetensors([]), "damaged|incomplete"),
        (safetensors({"__metadata__": 5, **ONE}), "damaged"),
        (b"", "incomplete"),
        (b"PK\3\4" + b"\0" * 40, "pickle"),
        (b"\x80\2}" + b"\0" * 40, "pickle"),
        (b"<!DOCTYPE html><html></html>" * 3, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"GGUF", "GGUF header"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "is incomplete"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "is incomplete"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "is incomplete"),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 99), "type 99"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**60), "is incomplete"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**60), "is incomplete"),
        (single_files.gguf_bytes({"a": ((2**60, 2), 0, b"")}), "describes"),
        (single_files.gguf_bytes({"a": ((1, 1, 1, 1, 1), 0, b"\0" * 4)}), "5 dimensions"),
        (single_files.gguf_bytes({"a": ((4,), 0, b"\0" * 16), "b": ((40,), 0, b"\0" * 160)})[:-1], "incomplete"),  # noqa: E501
        (single_files.gguf_bytes({"a": ((40,), 0, b"\0" * 16), "b": ((4,), 0, b"\0" * 160)}), "overlap"),
        (single_files.gguf_bytes(dict.fromkeys(("aa", "ab"), ((4,), 0, b"\0" * 32))).replace(b"b", b"a"), "twice"),  # noqa: E501
    ],
)  # fmt: skip
def test_hostile_headers(tmp_path: Path, content: bytes, said: str) -> None:
    refused(tmp_path / "x.safetensors", content, said)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """Sparse on this disk: a length that the file could hold, and that is none."""
    file = tmp_path / "x.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 3 << 30) + b"{")
        opened.truncate(4 << 30)
    tracemalloc.start()
    with pytest.raises(ModelError, match="damaged header"):
        weight_header.read_weight_header(file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def survives(file: Path, content: bytes) -> None:
    """Read as every part, to the end: an answer or a ModelError, nothing else."""
    file.write_bytes(content)
    for part in CHROMA_FORMAT.components:
        try:
            found, _ = read_component(file, part, CHROMA_FORMAT)
            if part == "transformer":
                single_file.read_transformer(file)
            for stored in found.values():
                assert stored.load().shape == stored.shape
        except (ModelError, MissingExtra):
            continue


APPROXIMATOR = "distilled_guidance_layer.in_proj"
SAMPLES = {
    "safetensors": safetensors({
        f"{APPROXIMATOR}.weight": {"dtype": "F8_E4M3", "shape": [4, 2], "data_offsets": [0, 8]},
        f"{APPROXIMATOR}.scale_weight": {"dtype": "F32", "shape": [], "data_offsets": [8, 12]},
        "img_in.weight": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [12, 16]},
        "double_blocks.0.img_attn.qkv.bias": {"dtype": "F16", "shape": [3], "data_offsets": [16, 22]},
    }, b"\0" * 22),
    "gguf": single_files.gguf_bytes({
        "distilled_guidance_layer.norms.0.scale": ((4,), 0, b"\0" * 16),
        "img_in.weight": ((1, 32), 8, b"\0" * 34),
        "double_blocks.0.img_attn.qkv.weight": ((3, 1), 30, b"\0" * 6),
    }),
}  # fmt: skip


def test_the_samples_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(SAMPLES["safetensors"])
    found = single_file.read_transformer(file)
    assert found["transformer_blocks.0.attn.to_v.bias"].load().tolist() == [0.0]
    assert found[f"{APPROXIMATOR}.weight"].dtype == torch.bfloat16


@QUICK
@given(
    kind=st.sampled_from(sorted(SAMPLES)),
    cut=st.integers(0, 400),
    spots=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=4),
)
def test_flipped_and_cut_bytes(
    tmp_path: Path, kind: str, cut: int, spots: list[tuple[int, int]]
) -> None:
    content = bytearray(SAMPLES[kind])
    for place, value in spots:
        content[place % len(content)] = value
    survives(tmp_path / "x.safetensors", bytes(content[: len(content) - (cut if cut < 200 else 0)]))


numbers = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31, 2**63, 2**64, -1, 2.5, "4", None, True])
)
shapes = st.one_of(st.lists(numbers, max_size=5), numbers)
names = st.sampled_from([
    "distilled_guidance_layer.in_proj.weight", "img_in.weight", "img_in.scale_weight", "scaled_fp8",
    "single_blocks.0.linear1.weight", "double_blocks.99999999.img_attn.qkv.weight", "shared.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.conv_in.weight", "model.diffusion_model.x",
    "encoder.down.7.block.0.conv1.weight", "", ".", "\n",
])  # fmt: skip
entries = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F8_E5M2", "I8", "F4", "", 3]),
    "shape": shapes, "data_offsets": shapes,
})  # fmt: skip


@QUICK
@given(head=st.dictionaries(names, entries, max_size=6), size=st.integers(0, 300))
def test_headers_made_up(tmp_path: Path, head: dict[str, object], size: int) -> None:
    survives(tmp_path / "x.safetensors", safetensors(head, b"\7" * size))


whole = st.tuples(
    names, st.sampled_from(["F32", "F16", "F8_E4M3", "I8"]), st.lists(st.integers(0, 5), max_size=4)
)


@QUICK
@example(
    tensors=[
        ("decoder.conv_in.weight", "F32", []),
        ("encoder.down.7.block.0.conv1.weight", "F32", []),
    ]
)
@example(
    tensors=[("single_blocks.0.linear1.weight", "F32", []), ("img_in.weight", "F32", [0])],
)
@given(tensors=st.lists(whole, max_size=8, unique_by=lambda one: one[0]))
def test_well_formed_files_of_anything(
    tmp_path: Path, tensors: list[tuple[str, str, list[int]]]
) -> None:
    """Past the header: configs and cuts made of shapes that no model has."""
    head, at = {}, 0
    for name, dtype, shape in tensors:
        size = torch.Size(shape).numel() * weight_header.SAFETENSORS_DTYPES[dtype].itemsize
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    file = tmp_path / "x.safetensors"
    survives(file, safetensors(head, b"\0" * at))
    for config in (single_file.infer_vae_config, single_file.infer_t5_config):
        try:
            config(file)
        except ModelError:
            continue

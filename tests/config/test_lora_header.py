"""What is no LoRA has no rank, whatever its header says: those who read it whole tell what is
wrong.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from simpletuner.config.load import try_load_mapping
from simpletuner.config.lora_header import read_ranks


def file(path: Path, header: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def test_the_largest_rank_and_the_largest_of_one_module(tmp_path: Path) -> None:
    shapes = {
        "a.lora_A.weight": [4, 64],
        "b.lora_down.weight": [8, 64],
        "c.qkv.lora_A.weight": [24, 64],
    }
    header = {key: {"dtype": "F32", "shape": shape} for key, shape in shapes.items()}
    assert read_ranks(file(tmp_path / "a.safetensors", json.dumps(header).encode())) == (24, 8)


@pytest.mark.parametrize(
    "shape", ["[Infinity]", "[1e999]", "[NaN]", "[]", "null", '"x"', "[[1]]", "9" * 5000]
)
def test_a_shape_that_is_none(tmp_path: Path, shape: str) -> None:
    header = f'{{"a.lora_A.weight": {{"shape": {shape}}}}}'
    assert read_ranks(file(tmp_path / "a.safetensors", header.encode())) == (0, 0)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 64, struct.pack("<Q", 2) + b"[]"])
def test_what_has_no_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert read_ranks(tmp_path / "a.safetensors") == (0, 0)


LOKR = {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr"}}


@pytest.mark.parametrize(
    ("key", "options", "told"),
    [
        ("x.lokr_w1", {}, 'is a lokr; set lora_type "lycoris" and algo "lokr" in lycoris_config'),
        ("x.hada_w1_a", LOKR, "is a loha; set"),
        ("x.lora_A.weight", LOKR, 'lora_type "standard"'),
        ("x.lokr_w2_a", LOKR, ""),
        ("x.lora_A.weight", {}, ""),
    ],
)  # fmt: skip
def test_another_kind_is_told_before_anything_is_loaded(
    key: str, options: dict[str, object], told: str, tmp_path: Path
) -> None:
    header = json.dumps({key: {"dtype": "F32", "shape": [8, 0], "data_offsets": [0, 0]}}).encode()
    tried = try_load_mapping(
        {"init_lora": str(file(tmp_path / "x.safetensors", header)), **options}, tmp_path
    )
    mine = [str(problem) for problem in tried.problems if "lora" in str(problem)]
    assert len(mine) == bool(told)
    assert told in "".join(mine)

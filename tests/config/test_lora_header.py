"""What is no LoRA has no rank, whatever its header says: those who read it whole tell what is
wrong.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from simpletuner.config.load import try_load_mapping
from simpletuner.config.lora_header import LoraRanks, read_ranks


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
    assert read_ranks(file(tmp_path / "a.safetensors", json.dumps(header).encode())) == LoraRanks(
        4, 24, 8
    )


@pytest.mark.parametrize(
    "shape", ["[Infinity]", "[1e999]", "[NaN]", "[]", "null", '"x"', "[[1]]", "9" * 5000]
)
def test_a_shape_that_is_none(tmp_path: Path, shape: str) -> None:
    header = f'{{"a.lora_A.weight": {{"shape": {shape}}}}}'
    assert read_ranks(file(tmp_path / "a.safetensors", header.encode())) == LoraRanks()


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 64, struct.pack("<Q", 2) + b"[]"])
def test_what_has_no_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert read_ranks(tmp_path / "a.safetensors") == LoraRanks()


MIXED = {
    "lora_type": "lycoris",
    "lycoris_config": {
        "algo": "lokr",
        "apply_preset": {
            "target_module": ["Attention", "FeedForward"],
            "module_algo_map": {"FeedForward": {"algo": "loha"}},
        },
    },
}
LOKR = {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr"}}


@pytest.mark.parametrize(
    ("key", "options", "told"),
    [
        ("x.lokr_w1", {}, 'is a lokr; set lora_type "lycoris" and algo "lokr" in lycoris_config'),
        ("x.hada_w1_a", LOKR, "is a loha; set"),
        ("x.lora_A.weight", LOKR, 'lora_type "standard"'),
        ("x.lokr_w2_a", LOKR, ""),
        ("x.lora_A.weight", {}, ""),
        ("x.lokr_w1 y.hada_w1_a", LOKR, 'is a loha and lokr; set lora_type "lycoris"'),
        ("x.lokr_w1 y.hada_w1_a", MIXED, ""),
        ("x.hada_w1_a", MIXED, ""),
        ("x.lora_A.weight", MIXED, 'lora_type "standard"'),
    ],
)  # fmt: skip
def test_another_kind_is_told_before_anything_is_loaded(
    key: str, options: dict[str, object], told: str, tmp_path: Path
) -> None:
    tensor = {"dtype": "F32", "shape": [8, 0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(key.split(), tensor)).encode()
    tried = try_load_mapping(
        {"init_lora": str(file(tmp_path / "x.safetensors", header)), **options}, tmp_path
    )
    mine = [str(problem) for problem in tried.problems if "lora" in str(problem)]
    assert len(mine) == bool(told)
    assert told in "".join(mine)


@pytest.mark.parametrize(
    ("ranks", "rank", "told"),
    [
        ([8, 8], 8, "lora_rank is 8, the rank of x.safetensors"),
        ([4, 8], 8, "lora_rank is 8, the largest rank of x.safetensors; others have 4 or more"),
    ],
)
def test_the_rank_is_that_of_the_largest_module(
    ranks: list[int], rank: int, told: str, tmp_path: Path
) -> None:
    header = {
        f"m{number}.lora_A.weight": {"dtype": "F32", "shape": [rank, 0], "data_offsets": [0, 0]}
        for number, rank in enumerate(ranks)
    }
    path = file(tmp_path / "x.safetensors", json.dumps(header).encode())
    tried = try_load_mapping({"init_lora": str(path), "model_family": "chroma"}, tmp_path)
    assert tried.loaded is not None, tried.problems
    assert tried.loaded.config.adapter.lora_rank == rank
    assert any(note.startswith(told) for note in tried.loaded.notices)
    problems = try_load_mapping({"init_lora": str(path), "lora_rank": 7}, tmp_path).problems
    assert any("init_lora has rank 8 and lora_rank is 7" in str(problem) for problem in problems)

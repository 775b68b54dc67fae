"""The proof at full size, on a network small enough for every run of the tests."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import simpletuner.models.chroma.weights as weights
from benchmarks import full_size
from simpletuner.models.block_executor import block_memory_policy
from simpletuner.quantization.schemes import get_scheme

LINEAR = "single_transformer_blocks.1.proj_out"
GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages in this process, in order."""
    made = tmp_path_factory.mktemp("out")
    for stage in full_size.STAGES:
        full_size.do(stage, made, full_size.TOY)
    return made


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """By the index alone, as other programs read it."""
    index = folder / "transformer" / f"{weights.WEIGHTS_STEM}.safetensors.index.json"
    found = {}
    for name, file in json.loads(index.read_text())["weight_map"].items():
        with safe_open(index.with_name(file), framework="pt") as tensors:
            found[name] = tensors.get_tensor(name)
    return found


def test_the_checkpoint_is_a_whole_random_chroma_in_shards(folder: Path) -> None:
    found = checkpoint(folder)
    assert set(found) == set(weights.transformer_tensors(folder / "transformer"))
    assert len(list((folder / "transformer").glob("*.safetensors"))) == 2
    matrices = {name: tensor.float() for name, tensor in found.items() if tensor.ndim == 2}
    for name, matrix in matrices.items():
        assert matrix.std().item() == pytest.approx(matrix.shape[1] ** -0.5, rel=0.1), name
        assert len(matrix.unique(dim=0)) == len(matrix), name
    assert len({tensor.flatten()[:8].numpy().tobytes() for tensor in matrices.values()}) == len(
        matrices
    )
    assert all((tensor == 1).all() for name, tensor in found.items() if "norm" in name)


def test_the_conversions_hold_what_the_checkpoint_holds(folder: Path) -> None:
    weight = checkpoint(folder)[f"{LINEAR}.weight"]
    for scheme, error in {"int8": 0.02, "nf4": 0.12}.items():
        (file,) = (folder / "quantized").glob(f"*-{scheme}-*")
        with safe_open(file, framework="pt") as tensors:
            parts = {
                part: tensors.get_tensor(f"{LINEAR}.{part}")
                for part in get_scheme(scheme).buffer_shapes(1, 1)
            }
        restored = get_scheme(scheme).dequantize(parts, weight.shape[1], torch.float32)
        assert (restored - weight).norm() < error * weight.float().norm()


def test_the_steps_train(folder: Path) -> None:
    trained = json.loads(full_size.finished(folder, "train").read_text())
    assert [one["step"] for one in trained["steps"]] == [1, 2, 3]
    assert all(0.1 < one["loss"] < 100 and one["grad_norm"] > 0 for one in trained["steps"])
    assert all(math.isfinite(one["grad_norm"]) for one in trained["steps"])
    memory = block_memory_policy(full_size.run_of(folder, "nf4").model, 3)
    assert len(memory.checkpointed_block_numbers(3)) == 3
    assert trained["cpu_s"] >= sum(one["cpu_s"] for one in trained["steps"])


def test_the_page_names_every_stage_and_step(folder: Path) -> None:
    page = full_size.markdown(full_size.collect(folder, threads=1))
    assert sum(line.startswith("| ") for line in page.splitlines()) == (2 + 5) + (2 + 3)
    for stage in ("write 845,184 parameters", "convert to int8", "convert to nf4", "map the nf4"):
        assert stage in page


def test_memory_is_told_apart_by_where_it_is_from(tmp_path: Path) -> None:
    size = 64 * 2**20
    file = tmp_path / "mapped"
    file.write_bytes(os.urandom(size))
    with full_size.measured() as found:
        before = full_size.resident()
        mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        mapped.max()
        between = full_size.resident()
        kept = torch.ones(size, dtype=torch.uint8)
        after = full_size.resident()
    assert between["file"] - before["file"] == pytest.approx(size, rel=0.05)
    assert after["anonymous"] - between["anonymous"] == pytest.approx(len(kept), rel=0.05)
    assert found["peak_anonymous_gb"] >= full_size.gb(after["anonymous"] - size // 10)
    assert found["peak_resident_gb"] >= full_size.gb(size) * 2


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"another --out"):
        full_size.require_room(tmp_path, 10**18)
    full_size.require_room(tmp_path, -GB)


def test_the_full_size_needs_what_the_page_says() -> None:
    network = weights.empty_transformer(full_size.FULL.config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    linears = {f"{name}.weight" for name in weights.block_linears(network)}
    assert full_size.needed_bytes(shapes, linears) / GB == pytest.approx(
        17.80 + 9.20 + 5.16, abs=0.02
    )
    assert len(full_size.split(shapes, full_size.FULL.shard_bytes)) == 4


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--toy",
        "--threads=1",
        f"--out={tmp_path / 'out'}",
        f"--results={tmp_path / 'results'}",
    ]
    full_size.main([*command, "--keep"])
    work = tmp_path / "out" / full_size.TOY.name
    full_size.finished(work, "train").unlink()
    capfd.readouterr()
    full_size.main(command)
    said = capfd.readouterr().out
    assert said.count("done before") == 3
    assert "train ..." in said
    assert not work.exists()
    result = json.loads((tmp_path / "results" / "full_size-toy.json").read_text())
    for stage in ("int8", "nf4"):
        assert result[stage]["peak_resident_gb"] < 1
    assert result["train"]["load"]["wall_s"] < 5

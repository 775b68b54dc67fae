"""LoRAs merged into a base file by file, against the same sums done at once in float64."""

from __future__ import annotations

import json
import os
import shutil
import signal
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from diffusers import ChromaTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.adapters.adapted_linear import adapted_modules
from simpletuner.adapters.deltas import LowRankDelta
from simpletuner.cli.merge import command
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ConfigError, DiskFull, ModelError
from simpletuner.models.chroma import single_file, weights
from simpletuner.models.chroma.lora_targets import preset_targets
from simpletuner.models.chroma.merge_loras import merge_loras
from simpletuner.models.weights import merge_loras as merging
from simpletuner.models.weights.merge_loras import MergeOutput
from simpletuner.quantization.stored_tensor import StoredTensor
from tests.adapters import chroma_lora
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.tiny_network import perturb
from tests.models.tiny_checkpoint import make_checkpoint

CPU, F32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base")) / "transformer"


def lora(
    base: Path, seed: int, preset: str = "all+ffs", **options: object
) -> dict[str, LowRankDelta]:
    network = weights.load_transformer(base, CPU, F32)
    chosen = AdapterOptions(lora_rank=4, **options)
    perturb(attach_adapter(network, chosen, preset_targets(network, preset), seed).trainable)
    return {name: one.to_delta() for name, one in adapted_modules(network).items()}


def dense(base: Path, *loras: tuple[Mapping[str, LowRankDelta], float]) -> dict[str, Tensor]:
    """In float64, from diffusers' own file."""
    state = {
        name: one.double()
        for name, one in load_file(base / f"{weights.WEIGHTS_STEM}.safetensors").items()
    }
    for factors, strength in loras:
        for name, one in factors.items():
            state[f"{name}.weight"] += strength * one.up.double() @ one.down.double()
    return state


def test_several_with_weights_into_a_diffusers_folder(base: Path, tmp_path: Path) -> None:
    one, two = lora(base, 1), lora(base, 2, "context")
    merge_loras(
        base,
        [(one, 0.5), (two, -2.0)],
        MergeOutput(tmp_path / "out", native_format=False, dtype=F32),
        {},
    )
    wanted, untouched = dense(base, (one, 0.5), (two, -2.0)), dense(base)
    found = load_file(tmp_path / "out" / f"{weights.WEIGHTS_STEM}.safetensors")
    assert found.keys() == wanted.keys()
    assert sum(not torch.equal(wanted[name], untouched[name]) for name in wanted) == len(one)
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
    loaded = ChromaTransformer2DModel.from_pretrained(tmp_path / "out")
    assert loaded.state_dict().keys() == wanted.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_each_is_counted_from_the_untouched_base(base: Path, tmp_path: Path) -> None:
    """A DoRA after a LoRA adds what it adds alone: its lengths are of the base's rows."""
    one, two = lora(base, 1), lora(base, 2, use_dora=True)
    made = {}
    for name, loras in {"both": [(one, 1.0), (two, 1.0)], "dora": [(two, 1.0)]}.items():
        merge_loras(base, loras, MergeOutput(tmp_path / name, native_format=False, dtype=F32), {})
        made[name] = load_file(tmp_path / name / f"{weights.WEIGHTS_STEM}.safetensors")
    plain, first = dense(base), dense(base, (one, 1.0))
    for name, tensor in made["both"].items():
        wanted = first[name] + made["dora"][name].double() - plain[name]
        assert (tensor - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_shards_are_found_by_diffusers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "SHARD_BYTES", 200_000)
    merge_loras(base, [], MergeOutput(tmp_path / "out", native_format=False, dtype=F32), {})
    files_ = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files_) > 2
    assert files_[0] == f"{weights.WEIGHTS_STEM}-00001-of-{len(files_):05d}.safetensors"
    loaded = ChromaTransformer2DModel.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in dense(base).items():
        assert torch.equal(loaded[name], tensor.float())


def test_a_native_file_holds_the_same_numbers(base: Path, tmp_path: Path) -> None:
    factors, path = lora(base, 1), tmp_path / "chroma.safetensors"
    merge_loras(
        base, [(factors, 1.0)], MergeOutput(path, native_format=True), {"modelspec.title": "moon"}
    )
    wanted, found = dense(base, (factors, 1.0)), load_file(path)
    assert not [name for name in found if name.startswith(("transformer_blocks", "x_embedder"))]
    names = [f"transformer_blocks.1.attn.to_{part}.weight" for part in "qkv"]
    fused = torch.cat([wanted[name] for name in names]).float()
    near = found["double_blocks.1.img_attn.qkv.weight"]
    assert near.dtype == torch.bfloat16
    assert (near.float() - fused).abs().max() <= 2**-8 * fused.abs().max(), "rounded once"
    assert torch.equal(near, merged_in_float32(base, factors, names).bfloat16())
    read = single_file.read_transformer(path)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (read[name].load().float() - tensor).abs().max() <= 2**-8 * tensor.abs().max(), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["modelspec.title"] == "moon"


def merged_in_float32(base: Path, factors: Mapping[str, LowRankDelta], names: list[str]) -> Tensor:
    state = load_file(base / f"{weights.WEIGHTS_STEM}.safetensors")
    of = [(state[name], factors[name.removesuffix(".weight")]) for name in names]
    return torch.cat([torch.addmm(weight, one.up, one.down) for weight, one in of])


def test_fp8_is_scaled_as_comfyui_reads_it(base: Path, tmp_path: Path) -> None:
    factors, path = lora(base, 1), tmp_path / "chroma.safetensors"
    merge_loras(
        base, [(factors, 1.0)], MergeOutput(path, native_format=True, dtype=torch.float8_e4m3fn), {}
    )
    found, wanted = load_file(path), dense(base, (factors, 1.0))
    assert found["scaled_fp8"].dtype == torch.float8_e4m3fn
    assert found["scaled_fp8"].numel() == 2, "two: products are not taken in fp8"
    small = {name for name, one in found.items() if one.dtype == torch.float8_e4m3fn} - {
        "scaled_fp8"
    }
    assert small == {
        name for name, one in found.items() if name.endswith(".weight") and one.ndim == 2
    }
    assert any("distilled_guidance_layer" in name for name in small)
    assert {name.replace(".weight", ".scale_weight") for name in small} <= found.keys()
    assert {one.dtype for name, one in found.items() if name not in small and "scale_w" not in name} == {
        torch.bfloat16, torch.float8_e4m3fn,
    }  # fmt: skip
    whole = torch.cat([wanted[f"single_transformer_blocks.0.{part}.weight"] for part in (
        "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")])  # fmt: skip
    name = "single_blocks.0.linear1"
    restored = found[f"{name}.weight"].double() * found[f"{name}.scale_weight"].double()
    step = found[f"{name}.scale_weight"].double() * 2**-9  # between the smallest numbers of e4m3
    assert ((restored - whole).abs() <= whole.abs() * 2**-4 + step).all()
    assert float(found[f"{name}.weight"].float().abs().max()) == 448.0
    for key, tensor in wanted.items():
        error = (single_file.read_transformer(path)[key].load().float() - tensor).abs().max()
        assert error <= 2**-4 * tensor.abs().max(), key


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_dora_is_merged_as_it_acts(base: Path, tmp_path: Path, strength: float) -> None:
    """PEFT's own forward, and at another strength the way between the two outputs, is the oracle."""
    factors, path = lora(base, 1, use_dora=True), tmp_path / "dora.safetensors"
    chroma_lora.save_deltas(factors, path, "diffusers", F32, {})
    acting = weights.load_transformer(base, CPU, F32)
    chroma_lora.load_adapter(acting, path, strength)
    target = MergeOutput(tmp_path / "out", native_format=False, dtype=F32)
    merge_loras(base, [(chroma_lora.read_lora_file(path).to_deltas(), strength)], target, {})
    merged = weights.load_transformer(target.path, CPU, F32)
    plain = weights.load_transformer(base, CPU, F32)
    name = "single_transformer_blocks.1.proj_mlp"
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    outputs = [network.get_submodule(name)(x) for network in (acting, merged, plain)]
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[0].abs().max()
    assert (outputs[0] - outputs[2]).abs().max() > 0.01 * outputs[0].abs().max()


def test_nothing_is_overwritten_and_nothing_half_is_left(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = MergeOutput(tmp_path / "x.safetensors", native_format=True)
    target.path.write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        merge_loras(base, [], target, {})
    assert target.path.read_text() == "mine"
    target.path.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DiskFull, match="the result needs"):
        merge_loras(base, [], target, {})
    monkeypatch.undo()

    def refused(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "_write_at", refused)
    with pytest.raises(DiskFull, match="No space left"):
        merge_loras(base, [], target, {})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_merge_leaves_no_result_and_the_next_one_cleans_up(
    base: Path, tmp_path: Path
) -> None:
    target = MergeOutput(tmp_path / "out", native_format=False)
    child = os.fork()
    if child == 0:
        count = iter(range(9))
        put = merging._write_at
        merging._write_at = lambda *given: (  # type: ignore[assignment]
            put(*given) if next(count, None) is not None else os.kill(os.getpid(), signal.SIGKILL)
        )
        merge_loras(base, [], target, {})
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    merge_loras(base, [], target, {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in target.path.iterdir()) == [
        "config.json", f"{weights.WEIGHTS_STEM}.safetensors"
    ]  # fmt: skip


def test_a_lora_of_another_model_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path
) -> None:
    wrong = {"transformer_blocks.0.attn.to_q": LowRankDelta(torch.zeros(2, 32), torch.zeros(32, 2))}
    with pytest.raises(
        ModelError,
        match=r"another model: transformer_blocks.0.attn.to_q is \(\d+, \d+\) in it and \(64, 64\) in the base",  # noqa: E501
    ):
        merge_loras(base, [(wrong, 1.0)], MergeOutput(tmp_path / "out", native_format=False), {})
    absent = {
        "transformer_blocks.77.attn.to_q": LowRankDelta(torch.zeros(2, 64), torch.zeros(64, 2))
    }
    with pytest.raises(ModelError, match=r"the base does not have transformer_blocks.77"):
        merge_loras(base, [(absent, 1.0)], MergeOutput(tmp_path / "out", native_format=False), {})
    huge = {
        "transformer_blocks.0.attn.to_q": LowRankDelta(
            torch.full((2, 64), 1e4), torch.full((64, 2), 1e4)
        )
    }
    with pytest.raises(ModelError, match="not finite in F16"):
        merge_loras(
            base,
            [(huge, 1.0)],
            MergeOutput(tmp_path / "out", native_format=False, dtype=torch.float16),
            {},
        )
    assert list(tmp_path.iterdir()) == []


def test_a_few_tensors_are_in_memory_at_a_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[int, int] = {}
    most, whole = [0], StoredTensor.load

    def watched(stored: StoredTensor) -> Tensor:
        tensor = whole(stored)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor), None)
        most[0] = max(most[0], sum(alive.values()))
        return tensor

    factors = lora(base, 1)
    monkeypatch.setattr(StoredTensor, "load", watched)
    merge_loras(
        base, [(factors, 1.0)], MergeOutput(tmp_path / "x.safetensors", native_format=True), {}
    )
    sizes = [tensor.nbytes for tensor in load_file(tmp_path / "x.safetensors").values()]
    assert most[0] <= 4 * max(sizes) < sum(2 * size for size in sizes) / 4


def test_the_command_takes_any_layout_and_says_what_it_did(base: Path, tmp_path: Path) -> None:
    one, two = lora(base, 1), lora(base, 2)
    chroma_lora.save_deltas(one, tmp_path / "a.safetensors", "kohya", F32, {})
    chroma_lora.save_deltas(two, tmp_path / "b=c.safetensors", "diffusers", F32, {})
    out = tmp_path / "out.safetensors"
    given = [
        "--lora",
        f"{tmp_path / 'a.safetensors'}=0.25",
        "--lora",
        str(tmp_path / "b=c.safetensors"),
    ]
    given += ["--base", str(base), "--output", str(out), "--dtype", "fp32"]
    done = CliRunner().invoke(command, given, catch_exceptions=False)
    assert done.stdout == f"{out}\n"
    assert "a.safetensors: kohya layout" in done.stderr
    assert "weight 0.25" in done.stderr
    name = "transformer_blocks.0.attn.to_q.weight"
    wanted = dense(base, (one, 0.25), (two, 1.0))[name]
    assert (
        single_file.read_transformer(out)[name].load() - wanted
    ).abs().max() <= 1e-6 * wanted.abs().max()
    with safe_open(out, framework="pt") as file:
        told = file.metadata()
    assert told["modelspec.merged_from"] == "transformer, a.safetensors x 0.25, b=c.safetensors x 1"
    assert str(tmp_path) not in json.dumps(told)
    for wrong, words in {
        ("--format", "diffusers"): "native is one .safetensors file, diffusers a folder",
        ("--lora", "x.safetensors=0,5"): "is not FILE=WEIGHT",
        (
            "--output",
            str(tmp_path / "folder"),
            "--dtype",
            "fp8",
        ): "diffusers cannot read scaled fp8",
        ("--output", str(tmp_path / "no" / "folder")): "does not exist",
    }.items():
        with pytest.raises(ConfigError, match=words):
            CliRunner().invoke(command, [*given, *wrong], catch_exceptions=False)

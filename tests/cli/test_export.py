from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="needs torch")

import torch
from safetensors.torch import load_file, save_file

from simpletuner.adapters.deltas import LowRankDelta
from simpletuner.cli.export import command
from simpletuner.cli.merge import command as merge
from simpletuner.errors import ConfigError, ModelError
from tests.adapters import chroma_lora
from tests.adapters.layout_files import AB, make_all_layouts, make_diffusers_file, split_factors

WIDTH = 16
FILES = make_all_layouts(WIDTH, rank=4, alpha=2.0)


def write(row, path, **header):
    held = FILES[row]
    save_file(held.tensors, path, metadata={"format": "pt", **held.header, **header})
    return path


def run(*words):
    result = CliRunner().invoke(command, [str(word) for word in words], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def deltas(path):
    return {
        name: one.up @ one.down
        for name, one in chroma_lora.read_lora_file(path).to_deltas().items()
    }


def same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name in found:
        assert (found[name] - wanted[name]).abs().max() <= tolerance * wanted[name].abs().max(), (
            name
        )


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("row", ["kohya", "diffusers+header", "comfyui-diffusers"])
def test_every_layout_into_every_layout(row, layout, tmp_path):
    source = write(
        row, tmp_path / "moon.safetensors", **{"modelspec.title": "moon", "ss_network_dim": "4"}
    )
    result = run(source, "--format", layout)
    path = tmp_path / f"moon.{layout}.safetensors"
    assert result.stdout.strip() == str(path)
    same(deltas(path), deltas(source))
    metadata = chroma_lora.read_lora_file(path).metadata
    assert metadata["modelspec.title"] == "moon"
    assert not {"ss_network_dim", "lora_adapter_metadata"} & set(metadata)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is not overwritten"):
        run(source, "--format", layout)
    assert path.read_bytes() == before


def test_strength_others_and_number_types(tmp_path):
    first, second = (
        write("kohya", tmp_path / "a.safetensors"),
        write("diffusers", tmp_path / "b.safetensors"),
    )
    out = tmp_path / "c.safetensors"
    run(
        first,
        "--format",
        "diffusers",
        "--strength",
        "0.5",
        "--with",
        f"{second}=-2",
        "--output",
        out,
    )
    one, other = deltas(first), deltas(second)
    same(deltas(out), {name: 0.5 * one[name] - 2 * other[name] for name in one})
    for dtype, kind, tolerance in (("bf16", torch.bfloat16, 2e-2), ("fp16", torch.float16, 2e-3)):
        out = tmp_path / f"{dtype}.safetensors"
        run(first, "--format", "kohya", "--dtype", dtype, "--output", out)
        assert {v.dtype for k, v in load_file(out).items() if "lora" in k.split(".", 1)[1]} == {
            kind
        }
        same(deltas(out), one, tolerance)


def test_what_fp16_cannot_hold_is_not_written(tmp_path):
    held = make_diffusers_file(lambda n: f"transformer.{n}", AB, None, WIDTH, 4)
    save_file({key: value * 1e6 for key, value in held.tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"cannot be read back.*NaN or infinite"):
        run(tmp_path / "a.safetensors", "--format", "comfyui", "--dtype", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("native", [False, True])
def test_a_smaller_rank_is_the_best_one_and_its_error_is_told(native):
    factors = {name: LowRankDelta(*pair) for name, pair in split_factors(WIDTH, 6).items()}
    small, error = chroma_lora.truncate_rank(factors, 3, native)
    assert small.keys() == factors.keys()
    whole = chroma_lora.fuse_modules(factors) if native else factors
    got = chroma_lora.fuse_modules(small) if native else small
    lost = total = 0.0
    for name, one in whole.items():
        assert got[name].rank == 3
        exact = torch.linalg.svdvals((one.up @ one.down).double())
        best = exact[3:].square().sum()
        mine = (one.up @ one.down - got[name].up @ got[name].down).double().square().sum()
        assert float(mine) == pytest.approx(float(best), rel=1e-4)
        lost, total = lost + float(best), total + float(exact.square().sum())
    assert error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    same_rank, nothing = chroma_lora.truncate_rank(factors, 24, native)
    assert nothing == 0.0
    for name, one in same_rank.items():
        assert torch.allclose(one.up @ one.down, factors[name].up @ factors[name].down, atol=1e-5)


def test_rank_by_the_command(tmp_path):
    source = write("diffusers", tmp_path / "a.safetensors")
    result = run(source, "--format", "kohya", "--rank", "2")
    assert "the delta differs by" in result.stderr
    assert chroma_lora.read_lora_file(tmp_path / "a.kohya.safetensors").to_deltas_and_summary()[
        1
    ].ranks == (2,)


def test_check_tells_every_program(tmp_path):
    text = run("--check", write("diffusers+header", tmp_path / "a.safetensors")).stdout
    assert "alpha 2, 17 modules" in text
    rows = {line[2:30].strip(): line for line in text.splitlines()[1:]}
    assert "applied" in rows["diffusers 0.42.1"]
    for name in ("ComfyUI 17358c8", "ComfyUI 0.3.64-0.8.0"):
        assert "strength 2: it does not read alpha from the header" in rows[name]
    assert "refused" in rows["Forge 2025-06-26"]
    assert "ignored" in rows["kohya sd-scripts 0087a46"]
    told = json.loads(
        run("--check", write("comfyui-diffusers", tmp_path / "b.safetensors"), "--json").stdout
    )
    assert (told["modules"], told["ranks"], told["alphas"]) == (17, [4], [2.0])
    assert {one["program"]: one["outcome"] for one in told["programs"]} == {
        "diffusers": "ignored", "ComfyUI": "ignored", "Forge": "refused", "kohya sd-scripts": "ignored"
    }  # fmt: skip
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--check"),
        (("--format", "kohya", "--check"), "either"),
        (("--json", "--format", "kohya"), "--json"),
        (("--format", "kohya", "--strength", "0"), "other than 0"),
        (("--format", "kohya", "--with", "x=y"), "--with: .*WEIGHT"),
        (("--format", "kohya", "--with", "x"), "x: no such file or folder"),
        (("--format", "kohya", "--output", "x.txt"), "safetensors"),
    ],
)
def test_mistakes(words, said, tmp_path):
    source = write("diffusers", tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=said):
        run(source, *words)


def test_a_dora_stays_in_the_layout_that_holds_it(tmp_path):
    held = make_diffusers_file(lambda n: f"transformer.{n}", AB, None, WIDTH, 4)
    for name in held.expected_deltas:
        held.tensors[f"transformer.{name}.lora_magnitude_vector"] = torch.ones(
            held.expected_deltas[name][1].shape[0]
        )
    save_file(held.tensors, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", "--format", "diffusers", "--output", tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors").keys() == held.tensors.keys()
    for words, said in (
        (("--format", "kohya"), "cannot hold a DoRA"),
        (("--format", "diffusers", "--strength", "2"), "cannot be scaled"),
        (("--format", "diffusers", "--rank", "2"), "cannot be reduced"),
    ):
        with pytest.raises(ModelError, match=said):
            run(tmp_path / "a.safetensors", *words)


def test_a_lokr_becomes_the_lora_near_it_when_a_rank_is_given(tmp_path):
    key, name = "lycoris_transformer_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q"
    w1, w2 = torch.randn(4, 4), torch.randn(4, 4)
    parts = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2, f"{key}.alpha": torch.tensor(1.0)}
    save_file(parts, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="--rank N"):
        run(tmp_path / "x.safetensors", "--format", "diffusers")
    result = run(
        tmp_path / "x.safetensors", "--format", "diffusers", "--rank", 16, "--strength", 0.5
    )
    assert "rank 16: the delta differs by 0.0" in result.stderr
    same(deltas(tmp_path / "x.diffusers.safetensors"), {name: 0.5 * torch.kron(w1, w2)}, 1e-4)
    run(tmp_path / "x.safetensors", "--format", "lycoris", "--strength", 0.5)
    (again,) = chroma_lora.read_lora_file(tmp_path / "x.lycoris.safetensors").to_deltas().values()
    assert torch.allclose(again.to_dense(), 0.5 * torch.kron(w1, w2), rtol=1e-5)
    told = json.loads(run(tmp_path / "x.safetensors", "--check", "--json").stdout)
    assert (told["kind"], told["ranks"]) == ("LoKr", [0])


@pytest.mark.parametrize(
    "words", [["--output", "y"], ["--output", "y.safetensors", "--base", "hd"]]
)
def test_merge_reads_loras_before_it_asks_for_a_base(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("simpletuner.models.chroma.family.ChromaFamily.locate_files", None)
    save_file(
        {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ModelError, match="whole weights"):
        CliRunner().invoke(merge, ["--lora", "x.safetensors", *words], catch_exceptions=False)

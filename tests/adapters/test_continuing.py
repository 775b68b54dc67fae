"""Going on from a file of any layout, and the second file beside the default one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.adapters import files, layouts
from simpletuner.adapters.linear import adapted
from simpletuner.adapters.lora import attach
from simpletuner.config.load import attempt_mapping
from simpletuner.config.rules import contradictions
from simpletuner.config.schema import AdapterOptions, RunConfig
from simpletuner.errors import ConfigError
from simpletuner.training.export import Exporter
from tests.adapters.matrix import twelve
from tests.adapters.networks import attention_names, perturb, run, tiny_chroma

WIDTH = 32  # of tiny_chroma


@pytest.mark.parametrize("row", twelve(8))
def test_training_goes_on_from_any_layout(row, tmp_path):
    held, path = twelve(WIDTH, rank=4, alpha=2.0)[row], tmp_path / "x.safetensors"
    save_file(held.tensors, path, metadata={"format": "pt", **held.header})
    network = tiny_chroma()
    options = AdapterOptions(lora_rank=4, lora_alpha=3.0, init_lora=str(path))
    result = attach(network, options, list(held.meant), 0)
    assert "rank 4, alpha" in str(result.continued)
    assert "17 modules: attn.add_k_proj" in str(result.continued)
    modules = adapted(network)
    for name, (a, b, strength) in held.meant.items():
        one = modules[name].delta()
        assert torch.allclose(one.up @ one.down, strength * (b @ a), rtol=1e-5, atol=1e-4), name
    run(network).square().sum().backward()
    assert all(parameter.grad is not None for _, parameter in result.trainable)
    shown = tiny_chroma()
    files.load_into(shown, path)
    assert torch.allclose(run(shown), run(network), rtol=1e-4, atol=1e-4)


def test_modules_of_a_smaller_rank_are_filled_up_and_act_the_same(tmp_path):
    held, path = twelve(WIDTH, rank=4)["diffusers"], tmp_path / "x.safetensors"
    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    held.tensors[key.format("A")] = held.tensors[key.format("A")][:2].contiguous()
    held.tensors[key.format("B")] = held.tensors[key.format("B")][:, :2].contiguous()
    save_file(held.tensors, path)
    network, shown = tiny_chroma(), tiny_chroma()
    attach(network, AdapterOptions(lora_rank=4, init_lora=str(path)), list(held.meant), 0)
    files.load_into(shown, path)
    assert torch.allclose(run(shown), run(network), rtol=1e-5, atol=1e-5)
    filled = adapted(network)["transformer_blocks.0.attn.to_q"]
    assert filled.down[2:].any()
    assert not filled.up[:, 2:].any()


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_the_second_file_acts_as_the_first(layout, tmp_path):
    network = tiny_chroma()
    options = AdapterOptions(lora_rank=4, lora_alpha=3.0, lora_format=layout)
    perturb(attach(network, options, attention_names(network), 5).trainable)
    net = SimpleNamespace(uses_lora=True, transformer=network, average=None)
    exporter = Exporter(
        SimpleNamespace(name="chroma"),
        net,
        RunConfig(adapter=options),
        None,
        None,
        lambda step, weights: {"weights": weights, "ss_steps": str(step)},
    )
    exporter.into_checkpoint(tmp_path, 7)
    default, other = (
        tmp_path / "pytorch_lora_weights.safetensors",
        f"pytorch_lora_weights.{layout}.safetensors",
    )
    assert {path.name for path in tmp_path.iterdir()} == {default.name, other}
    found = []
    for path in (default, tmp_path / other):
        shown = tiny_chroma()
        files.load_into(shown, path)
        found.append(run(shown))
    assert torch.allclose(found[0], run(network), rtol=0, atol=2e-6)
    assert torch.allclose(found[0], found[1], rtol=0, atol=2e-6)
    assert layouts.read(tmp_path / other).layout == layout


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_rows_in_the_wrong_place_never_get_their_name(layout, tmp_path, monkeypatch):
    network = tiny_chroma()
    perturb(attach(network, AdapterOptions(lora_rank=4), attention_names(network), 5).trainable)
    honest = files._tensors

    def swapped(*given):
        tensors = honest(*given)
        key = next(key for key in tensors if "img_attn" in key and "qkv" in key and "lora_up" in key)
        q, k, v = tensors[key].chunk(3)
        return {**tensors, key: torch.cat([k, q, v])}

    monkeypatch.setattr(files, "_tensors", swapped)
    with pytest.raises(Exception, match="saved LoRA would act differently"):
        files.save(network, tmp_path / "a.safetensors", layout=layout)
    monkeypatch.setattr(
        files, "_tensors", lambda *given: {k: v for k, v in honest(*given).items() if "alpha" not in k}
    )
    if layout == "kohya":
        with pytest.raises(Exception, match=r"refused by kohya.*needs an alpha"):
            files.save(network, tmp_path / "a.safetensors", layout=layout)
    assert not list(tmp_path.iterdir())


def test_what_no_second_file_could_hold_is_refused_at_the_start():
    outer = AdapterOptions(lora_format="kohya")
    with pytest.raises(ConfigError, match="reaches the blocks only"):
        attach(tiny_chroma(), outer, ["proj_out"], 0)
    attach(tiny_chroma(), AdapterOptions(lora_format="comfyui"), ["proj_out"], 0)
    dora = RunConfig(adapter=AdapterOptions(use_dora=True, lora_format="kohya"))
    assert ("lora_format" in {name for name, _ in contradictions(dora, {})}) is True
    plain = RunConfig(adapter=AdapterOptions(use_dora=True))
    assert "lora_format" not in {name for name, _ in contradictions(plain, {})}


def test_a_second_file_of_an_untrained_lora(tmp_path):
    network = tiny_chroma()
    attach(network, AdapterOptions(lora_rank=4), attention_names(network)[:1], 5)
    files.save(network, tmp_path / "a.safetensors", layout="kohya")
    assert load_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("row", twelve(8))
def test_the_rank_is_the_files_unless_one_is_given(row, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(twelve(8, rank=6)[row].tensors, path)
    given = {"init_lora": str(path)}
    tried = attempt_mapping(given, tmp_path)
    assert tried.loaded.run.adapter.lora_rank == 6
    assert "lora_rank is 6, as x.safetensors has it" in tried.loaded.notes
    assert attempt_mapping({**given, "lora_rank": 9}, tmp_path).loaded.run.adapter.lora_rank == 9
    (problem,) = attempt_mapping({**given, "lora_rank": 4}, tmp_path).problems
    assert "init_lora has rank 6 and lora_rank is 4; leave it out, or" in problem.what


def test_a_file_of_a_smaller_rank_is_gone_on_from_with_zeros(tmp_path):
    held, path = twelve(WIDTH, rank=4)["kohya"], tmp_path / "x.safetensors"
    save_file(held.tensors, path)
    network, shown = tiny_chroma(), tiny_chroma()
    attach(network, AdapterOptions(lora_rank=7, init_lora=str(path)), list(held.meant), 0)
    files.load_into(shown, path)
    assert torch.allclose(run(shown), run(network), rtol=1e-5, atol=1e-5)
    assert not any(module.up[:, 4:].any() for module in adapted(network).values())


NO_LORA = (b"", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]", b"\x08" + b"\0" * 7 + b'{"a": 1}')


@pytest.mark.parametrize("content", NO_LORA)
def test_what_is_no_lora_leaves_the_rank_to_those_who_read_it(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    tried = attempt_mapping({"init_lora": str(tmp_path / "x.safetensors")}, tmp_path)
    assert tried.loaded.run.adapter.lora_rank == 16


def test_a_block_diagonal_file_may_be_gone_on_from_at_the_rank_of_its_parts(tmp_path):
    """What kohya's layout fuses has the ranks of q, k and v added up."""
    network = tiny_chroma()
    perturb(attach(network, AdapterOptions(lora_rank=4), attention_names(network), 5).trainable)
    files.save(network, tmp_path / "x.safetensors", layout="kohya")
    given = {"init_lora": str(tmp_path / "x.safetensors"), "lora_rank": 4}
    run_of = attempt_mapping(given, tmp_path).loaded.run
    again = tiny_chroma()
    attach(again, run_of.adapter, attention_names(again), 9)
    assert torch.allclose(run(again), run(network), rtol=0, atol=2e-6)

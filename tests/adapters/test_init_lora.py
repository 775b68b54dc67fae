"""Going on from a file of any layout, and the second file beside the default one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.adapters import lora_io
from simpletuner.adapters.adapted_linear import adapted_modules
from simpletuner.config.constraints import find_errors
from simpletuner.config.load import try_load_mapping
from simpletuner.config.schema import AdapterOptions, RunConfig
from simpletuner.errors import ConfigError
from simpletuner.models.chroma.lora_programs import CHROMA_LORA
from simpletuner.training.exporter import Exporter
from tests.adapters import chroma_lora
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.layout_files import make_all_layouts
from tests.adapters.tiny_network import attention_names, perturb, run_forward, tiny_chroma

WIDTH = 32  # of tiny_chroma


@pytest.mark.parametrize("row", make_all_layouts(8))
def test_training_goes_on_from_any_layout(row, tmp_path):
    held, path = make_all_layouts(WIDTH, rank=4, alpha=2.0)[row], tmp_path / "x.safetensors"
    save_file(held.tensors, path, metadata={"format": "pt", **held.header})
    network = tiny_chroma()
    options = AdapterOptions(lora_rank=4, lora_alpha=3.0, init_lora=str(path))
    result = attach_adapter(network, options, list(held.expected_deltas), 0)
    assert "rank 4, alpha" in str(result.initialized_from)
    assert "17 modules: attn.add_k_proj" in str(result.initialized_from)
    modules = adapted_modules(network)
    for name, (a, b, strength) in held.expected_deltas.items():
        one = modules[name].to_delta()
        assert torch.allclose(one.up @ one.down, strength * (b @ a), rtol=1e-5, atol=1e-4), name
    run_forward(network).square().sum().backward()
    assert all(parameter.grad is not None for _, parameter in result.trainable)
    shown = tiny_chroma()
    chroma_lora.load_adapter(shown, path)
    assert torch.allclose(run_forward(shown), run_forward(network), rtol=1e-4, atol=1e-4)


def test_modules_of_a_smaller_rank_are_filled_up_and_act_the_same(tmp_path):
    held, path = make_all_layouts(WIDTH, rank=4)["diffusers"], tmp_path / "x.safetensors"
    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    held.tensors[key.format("A")] = held.tensors[key.format("A")][:2].contiguous()
    held.tensors[key.format("B")] = held.tensors[key.format("B")][:, :2].contiguous()
    save_file(held.tensors, path)
    network, shown = tiny_chroma(), tiny_chroma()
    attach_adapter(
        network, AdapterOptions(lora_rank=4, init_lora=str(path)), list(held.expected_deltas), 0
    )
    chroma_lora.load_adapter(shown, path)
    assert torch.allclose(run_forward(shown), run_forward(network), rtol=1e-5, atol=1e-5)
    filled = adapted_modules(network)["transformer_blocks.0.attn.to_q"]
    assert filled.down[2:].any()
    assert not filled.up[:, 2:].any()


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_the_second_file_acts_as_the_first(layout, tmp_path):
    network = tiny_chroma()
    options = AdapterOptions(lora_rank=4, lora_alpha=3.0, lora_format=layout)
    perturb(attach_adapter(network, options, attention_names(network), 5).trainable)
    net = SimpleNamespace(uses_lora=True, transformer=network, averaged_weights=None)
    exporter = Exporter(
        SimpleNamespace(name="chroma", lora_conventions=CHROMA_LORA),
        net,
        RunConfig(adapter=options),
        None,
        None,
        None,
        lambda step, weights: {"weights": weights, "ss_steps": str(step)},
    )
    exporter.export_to_checkpoint(tmp_path, 7)
    default, other = (
        tmp_path / "pytorch_lora_weights.safetensors",
        f"pytorch_lora_weights.{layout}.safetensors",
    )
    assert {path.name for path in tmp_path.iterdir()} == {default.name, other}
    found = []
    for path in (default, tmp_path / other):
        shown = tiny_chroma()
        chroma_lora.load_adapter(shown, path)
        found.append(run_forward(shown))
    assert torch.allclose(found[0], run_forward(network), rtol=0, atol=2e-6)
    assert torch.allclose(found[0], found[1], rtol=0, atol=2e-6)
    assert chroma_lora.read_lora_file(tmp_path / other).layout == layout


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_rows_in_the_wrong_place_never_get_their_name(layout, tmp_path, monkeypatch):
    network = tiny_chroma()
    perturb(
        attach_adapter(network, AdapterOptions(lora_rank=4), attention_names(network), 5).trainable
    )
    honest = lora_io._delta_tensors

    def swapped(*given):
        tensors = honest(*given)
        key = next(
            key for key in tensors if "img_attn" in key and "qkv" in key and "lora_up" in key
        )
        q, k, v = tensors[key].chunk(3)
        return {**tensors, key: torch.cat([k, q, v])}

    monkeypatch.setattr(lora_io, "_delta_tensors", swapped)
    with pytest.raises(Exception, match="saved LoRA would be applied differently"):
        chroma_lora.save_adapter(network, tmp_path / "a.safetensors", layout=layout)
    monkeypatch.setattr(
        lora_io,
        "_delta_tensors",
        lambda *given: {k: v for k, v in honest(*given).items() if "alpha" not in k},
    )
    if layout == "kohya":
        with pytest.raises(Exception, match=r"refused by kohya.*needs an alpha"):
            chroma_lora.save_adapter(network, tmp_path / "a.safetensors", layout=layout)
    assert not list(tmp_path.iterdir())


def test_what_no_second_file_could_hold_is_refused_at_the_start():
    outer = AdapterOptions(lora_format="kohya")
    with pytest.raises(ConfigError, match="can only hold modules inside the blocks"):
        attach_adapter(tiny_chroma(), outer, ["proj_out"], 0)
    attach_adapter(tiny_chroma(), AdapterOptions(lora_format="comfyui"), ["proj_out"], 0)
    dora = RunConfig(adapter=AdapterOptions(use_dora=True, lora_format="kohya"))
    assert ("lora_format" in {name for name, _ in find_errors(dora, {})}) is True
    plain = RunConfig(adapter=AdapterOptions(use_dora=True))
    assert "lora_format" not in {name for name, _ in find_errors(plain, {})}


def test_a_second_file_of_an_untrained_lora(tmp_path):
    network = tiny_chroma()
    attach_adapter(network, AdapterOptions(lora_rank=4), attention_names(network)[:1], 5)
    chroma_lora.save_adapter(network, tmp_path / "a.safetensors", layout="kohya")
    assert load_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("row", make_all_layouts(8))
def test_the_rank_is_the_files_unless_one_is_given(row, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(make_all_layouts(8, rank=6)[row].tensors, path)
    given = {"init_lora": str(path)}
    tried = try_load_mapping(given, tmp_path)
    assert tried.loaded.config.adapter.lora_rank == 6
    assert "lora_rank is 6, the rank of x.safetensors" in tried.loaded.notices
    assert (
        try_load_mapping({**given, "lora_rank": 9}, tmp_path).loaded.config.adapter.lora_rank == 9
    )
    (problem,) = try_load_mapping({**given, "lora_rank": 4}, tmp_path).problems
    assert "init_lora has rank 6 and lora_rank is 4; leave lora_rank out, or" in problem.message


def test_a_file_of_a_smaller_rank_is_gone_on_from_with_zeros(tmp_path):
    held, path = make_all_layouts(WIDTH, rank=4)["kohya"], tmp_path / "x.safetensors"
    save_file(held.tensors, path)
    network, shown = tiny_chroma(), tiny_chroma()
    attach_adapter(
        network, AdapterOptions(lora_rank=7, init_lora=str(path)), list(held.expected_deltas), 0
    )
    chroma_lora.load_adapter(shown, path)
    assert torch.allclose(run_forward(shown), run_forward(network), rtol=1e-5, atol=1e-5)
    assert not any(module.up[:, 4:].any() for module in adapted_modules(network).values())


NO_LORA = (b"", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]", b"\x08" + b"\0" * 7 + b'{"a": 1}')


@pytest.mark.parametrize("content", NO_LORA)
def test_what_is_no_lora_leaves_the_rank_to_those_who_read_it(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    tried = try_load_mapping({"init_lora": str(tmp_path / "x.safetensors")}, tmp_path)
    assert tried.loaded.config.adapter.lora_rank == 16


def test_a_block_diagonal_file_may_be_gone_on_from_at_the_rank_of_its_parts(tmp_path):
    """What kohya's layout fuses has the ranks of q, k and v added up."""
    network = tiny_chroma()
    perturb(
        attach_adapter(network, AdapterOptions(lora_rank=4), attention_names(network), 5).trainable
    )
    chroma_lora.save_adapter(network, tmp_path / "x.safetensors", layout="kohya")
    given = {"init_lora": str(tmp_path / "x.safetensors"), "lora_rank": 4}
    run_of = try_load_mapping(given, tmp_path).loaded.config
    again = tiny_chroma()
    attach_adapter(again, run_of.adapter, attention_names(again), 9)
    assert torch.allclose(run_forward(again), run_forward(network), rtol=0, atol=2e-6)

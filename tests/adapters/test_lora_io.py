from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from simpletuner.adapters import lora_io
from simpletuner.adapters.attachment import set_strength
from simpletuner.adapters.safetensors_reader import LORA_WEIGHTS_NAME
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ConfigError, DiskFull, ModelError
from simpletuner.models.chroma.module_names import CHROMA_MODULE_NAMES
from tests.adapters import chroma_lora
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.tiny_network import (
    attention_names,
    make_pipeline,
    perturb,
    run_forward,
    tiny_chroma,
)

KINDS = {
    "plain": AdapterOptions(lora_rank=4),
    "alpha": AdapterOptions(lora_rank=6, lora_alpha=2.5),
    "rslora": AdapterOptions(lora_rank=4, lora_alpha=3.0, use_rslora=True),
    "dora": AdapterOptions(lora_rank=4, lora_alpha=3.0, use_dora=True),
    "pissa": AdapterOptions(lora_rank=4, lora_alpha=3.0, lora_init_type="pissa"),
    "olora": AdapterOptions(lora_rank=4, lora_init_type="olora"),
}


def trained(options: AdapterOptions, names: list[str] | None = None):
    network = tiny_chroma()
    result = attach_adapter(network, options, names or attention_names(network), 5)
    perturb(result.trainable)
    return network, result


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_applies_exactly_our_delta(kind, tmp_path, caplog):
    network, _ = trained(KINDS[kind])
    chroma_lora.save_adapter(network, tmp_path / LORA_WEIGHTS_NAME, {"modelspec.title": "moon"})
    base = run_forward(tiny_chroma())
    loaded = make_pipeline(tiny_chroma())
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        loaded.load_lora_weights(tmp_path)
    messages = [record.getMessage() for record in caplog.records]
    assert not [message for message in messages if "text_encoder" not in message]
    ours, theirs = run_forward(network) - base, run_forward(loaded.transformer) - base
    assert ours.abs().max() > 0.01
    assert (ours - theirs).abs().max() < 2e-6 * base.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", KINDS)
def test_load_into_is_the_inverse_of_save(kind, tmp_path):
    network, _ = trained(KINDS[kind])
    written = chroma_lora.save_adapter(network, tmp_path / "a.safetensors")
    other = tiny_chroma()
    assert (
        chroma_lora.load_adapter(other, tmp_path / "a.safetensors")
        == written
        == chroma_lora.read_summary(tmp_path / "a.safetensors")
    )
    assert (written.kind == "DoRA") == (kind == "dora")
    rank = KINDS[kind].lora_rank * (2 if kind in ("pissa", "olora") else 1)
    assert written.ranks == (rank,)
    assert torch.allclose(run_forward(other), run_forward(network), rtol=0, atol=2e-6)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    for strength in (0.0, 0.4):
        for each in (network, other):
            set_strength(each, strength)
        assert torch.allclose(run_forward(other), run_forward(network), rtol=0, atol=2e-6)
    assert torch.equal(run_forward(set_and_return(other, 0.0)), run_forward(tiny_chroma()))


def set_and_return(network, strength):
    set_strength(network, strength)
    return network


def test_layout_and_header(tmp_path):
    network, result = trained(KINDS["alpha"])
    header = {
        "modelspec.title": "moon",
        "base": "lodestones/Chroma1-HD",
        "data": "/home/me/secret/pictures",
    }
    chroma_lora.save_adapter(network, tmp_path / "a.safetensors", header)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    tensors = load_file(tmp_path / "a.safetensors")
    assert set(tensors) == {f"transformer.{name}" for name, _ in result.trainable}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    name, up = next((name, p) for name, p in result.trainable if "lora_B" in name)
    assert torch.equal(tensors[f"transformer.{name}"], up * (2.5 / 6))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "format": "pt", "modelspec.title": "moon", "base": "lodestones/Chroma1-HD", "data": "pictures"
        }  # fmt: skip
    for path in ("./my-chroma", "../x/my-chroma/", "~/my-chroma", "C:\\models\\my-chroma"):
        chroma_lora.save_adapter(network, tmp_path / "a.safetensors", {"base": path})
        assert chroma_lora.read_summary(tmp_path / "a.safetensors").metadata["base"] == "my-chroma"
    with pytest.raises(ModelError, match="lora_adapter_metadata"):
        chroma_lora.save_adapter(
            network, tmp_path / "b.safetensors", {"lora_adapter_metadata": "{}"}
        )


def wrong_strength(tensors):
    return {
        key: value * (1.00001 if key.endswith("to_q.lora_B.weight") else 1)
        for key, value in tensors.items()
    }


def wrong_prefix(tensors):
    return {
        key.replace("transformer.", "diffusion_model.", 1): value for key, value in tensors.items()
    }


def one_lost(tensors):
    gone = next(key for key in tensors if key.endswith("to_k.lora_A.weight"))
    return {key: value for key, value in tensors.items() if key != gone}


def swapped_modules(tensors):
    return {key.replace(".to_q.", ".?.").replace(".to_k.", ".to_q.").replace(".?.", ".to_k."): value
            for key, value in tensors.items()}  # fmt: skip


def not_a_number(tensors):
    key = next(iter(tensors))
    return {**tensors, key: tensors[key] * float("nan")}


def alpha_added(tensors):
    names = {key.split(".lora_")[0] for key in tensors}
    return {**tensors, **{f"{name}.alpha": torch.tensor(1.0) for name in names}}


@pytest.mark.parametrize(
    "damage", [wrong_strength, wrong_prefix, one_lost, swapped_modules, not_a_number, alpha_added]
)
def test_a_file_that_would_act_differently_never_gets_its_name(damage, tmp_path, monkeypatch):
    network, _ = trained(KINDS["alpha"])
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"the one before")
    honest = lora_io._delta_tensors
    monkeypatch.setattr(lora_io, "_delta_tensors", lambda *given: damage(honest(*given)))
    with pytest.raises(ModelError, match=r"saved LoRA (would|cannot)"):
        chroma_lora.save_adapter(network, target)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the one before"]


def test_a_wrong_magnitude_is_seen(tmp_path, monkeypatch):
    network, _ = trained(KINDS["dora"])
    honest = lora_io._delta_tensors
    monkeypatch.setattr(
        lora_io,
        "_delta_tensors",
        lambda *given: {k: v + 1e-4 * ("magnitude" in k) for k, v in honest(*given).items()},
    )
    with pytest.raises(ModelError, match="applied differently"):
        chroma_lora.save_adapter(network, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_t2", "is a LoKr of convolutions"),
        (
            "lycoris_transformer_blocks_0_attn_to_q.hada_w1_a",
            "hada_w1 is neither one matrix nor a pair",
        ),
        ("base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight", "PEFT adapter folder"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder weights"),
        ("lora_unet_double_blocks_0_img_mod_lin.lora_down.weight", "Flux has but Chroma does not"),
        ("lora_unet_distilled_guidance_layer_in_proj.lora_down.weight", "breaks the model"),
        ("distilled_guidance_layer.in_proj.weight", "not a LoRA of Chroma: it holds whole weights"),
        ("double_blocks.0.lora.weight", "is not a LoRA of Chroma"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "has no lora_B.weight"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "has no lora_up.weight"),
    ],
)
def test_what_no_layout_has_is_refused_by_name(key, named, tmp_path):
    save_file({key: torch.zeros(4, 32)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=named):
        chroma_lora.read_summary(tmp_path / "x.safetensors")
    network, _ = trained(KINDS["plain"])
    chroma_lora.save_adapter(network, tmp_path / "good.safetensors")
    mixed = {
        **load_file(tmp_path / "good.safetensors"),
        key.replace(".to_q.", ".to_z."): torch.zeros(4, 32),
    }
    save_file(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(ModelError):
        chroma_lora.load_adapter(tiny_chroma(), tmp_path / "mixed.safetensors")


def test_unreadable_missing_and_foreign_networks(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        chroma_lora.read_summary(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not at all")
    with pytest.raises(ModelError, match="not a readable"):
        chroma_lora.read_summary(tmp_path / "x.safetensors")
    path = tmp_path / "y.safetensors"
    save_file({f"transformer.block.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}, path)
    with pytest.raises(ModelError, match="another network: the network has no block"):
        chroma_lora.load_adapter(tiny_chroma(), path)
    save_file({f"transformer.proj_out.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}, path)
    with pytest.raises(ModelError, match="another size"):
        chroma_lora.load_adapter(tiny_chroma(), path)
    save_file({}, path)
    with pytest.raises(ModelError, match="no LoRA weights"):
        chroma_lora.read_summary(path)
    with pytest.raises(ModelError, match="does not have an adapter"):
        chroma_lora.save_adapter(tiny_chroma(), path)


def test_alpha_tensors_and_mixed_ranks_are_read_as_diffusers_reads_them(tmp_path):
    names = ["proj_out", "single_transformer_blocks.0.proj_out"]
    shapes = {name: tiny_chroma().get_submodule(name).weight.shape for name in names}
    tensors = {}
    for rank, name in zip((2, 3), names):
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, shapes[name][1])
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(shapes[name][0], rank)
        tensors[f"transformer.{name}.alpha"] = torch.tensor(5.0)
    save_file(tensors, tmp_path / "x.safetensors")
    network = tiny_chroma()
    assert chroma_lora.load_adapter(network, tmp_path / "x.safetensors").ranks == (2, 3)
    expected = tiny_chroma()
    for rank, name in zip((2, 3), names):
        up, down = (tensors[f"transformer.{name}.lora_{x}.weight"] for x in "BA")
        expected.get_submodule(name).weight.add_(up @ down * (5.0 / rank))
    assert torch.allclose(run_forward(network), run_forward(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_strength_in_the_header_is_read_as_diffusers_reads_it(use_rslora, tmp_path):
    names = attention_names(tiny_chroma())
    trained_there = tiny_chroma()
    config = LoraConfig(r=4, lora_alpha=7, use_rslora=use_rslora, target_modules=names)
    config.init_lora_weights = False
    config.alpha_pattern = {"transformer_blocks.0.attn.to_q": 3}
    trained_there.add_adapter(config)
    make_pipeline(trained_there).save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained_there),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    assert "lora_adapter_metadata" in chroma_lora.read_summary(tmp_path).metadata
    ours, theirs = tiny_chroma(), make_pipeline(tiny_chroma())
    theirs.load_lora_weights(tmp_path)
    chroma_lora.load_adapter(ours, tmp_path)
    assert (run_forward(ours) - run_forward(tiny_chroma())).abs().max() > 0.01
    assert torch.allclose(run_forward(ours), run_forward(theirs.transformer), rtol=0, atol=2e-6)

    path = tmp_path / LORA_WEIGHTS_NAME
    tensors, header = load_file(path), chroma_lora.read_summary(path).metadata
    save_file(alpha_added(tensors), path, header)
    with pytest.raises(ModelError, match="an alpha that differs from the header"):
        chroma_lora.read_summary(path)
    save_file(tensors, path, {"lora_adapter_metadata": "[1]"})
    with pytest.raises(ModelError, match="not a JSON object"):
        chroma_lora.read_summary(path)


def test_init_lora_continues_the_delta_under_another_alpha(tmp_path):
    network, _ = trained(KINDS["alpha"])
    chroma_lora.save_adapter(network, tmp_path / "a.safetensors")
    path = str(tmp_path / "a.safetensors")
    goal = run_forward(network)
    for alpha in (2.5, 6.0):
        other = tiny_chroma()
        attach_adapter(
            other,
            AdapterOptions(lora_rank=6, lora_alpha=alpha, init_lora=path),
            attention_names(other),
            9,
        )
        assert torch.allclose(run_forward(other), goal, rtol=0, atol=2e-6)
    with pytest.raises(
        ConfigError, match="has rank 6, but lora_rank is 4; set lora_rank to 6, or reduce"
    ):
        attach_adapter(
            tiny_chroma(),
            AdapterOptions(lora_rank=4, init_lora=path),
            attention_names(other.cpu()),
            9,
        )
    with pytest.raises(ConfigError, match="21 unexpected"):
        attach_adapter(
            tiny_chroma(),
            AdapterOptions(lora_rank=6, init_lora=path),
            attention_names(tiny_chroma())[:1],
            9,
        )
    options = AdapterOptions(lora_rank=6, init_lora=path, use_dora=True)
    with pytest.raises(ConfigError, match=r"is a LoRA; set .*use_dora = false"):
        attach_adapter(tiny_chroma(), options, attention_names(tiny_chroma()), 9)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left")]
)
def test_a_full_disk_says_so_and_keeps_the_file_before(error, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise error

    network, _ = trained(KINDS["plain"])
    (tmp_path / "a.safetensors").write_bytes(b"the one before")
    monkeypatch.setattr(lora_io, "save_file", full)
    with pytest.raises(DiskFull, match=r"a\.safetensors cannot be written: No space left"):
        chroma_lora.save_adapter(network, tmp_path / "a.safetensors")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the one before"]


def test_saves_beside_nothing_but_itself(tmp_path: Path):
    network, _ = trained(KINDS["plain"])
    for _ in range(2):
        chroma_lora.save_adapter(network, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".lora_A.weight", ".lora_B.weight"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, suffix: str) -> None:
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{module}{name}": torch.ones(4, 4) for name in (".lora_A.weight", ".lora_B.weight")}
    tensors[module + suffix][1, 2] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(
        ModelError, match=r"bad\.safetensors: 1 of 16 values of .* are NaN or infinite"
    ):
        lora_io.read_summary(tmp_path / "bad.safetensors", CHROMA_MODULE_NAMES)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_integers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{module}{name}": torch.ones(4, 4).to(dtype)
        for name in (".lora_A.weight", ".lora_B.weight")
    }
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match=r"bad\.safetensors .*dtype torch\..*floating-point"):
        lora_io.read_summary(tmp_path / "bad.safetensors", CHROMA_MODULE_NAMES)

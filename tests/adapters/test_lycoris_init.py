"""LoHa and LoKr: against PEFT's layers, against their formulas told anew, in files, in each
program.
"""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from peft.tuners.lokr.layer import factorization as theirs_factorization
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.adapters import lora_io, merge_deltas
from simpletuner.adapters.adapted_linear import LycorisLinear, adapted_modules
from simpletuner.adapters.attachment import set_strength
from simpletuner.adapters.deltas import LycorisDelta
from simpletuner.adapters.lycoris_init import factorization
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ConfigError, ModelError
from simpletuner.models.chroma.lora_targets import preset_targets
from simpletuner.quantization.quantized_linear import QuantizedLinear
from tests.adapters import chroma_lora
from tests.adapters.chroma_lora import NAMES, attach_adapter, check_compatibility
from tests.adapters.tiny_network import (
    attention_names,
    make_pipeline,
    perturb,
    run_forward,
    tiny_chroma,
)

LOHA = {"algo": "loha", "linear_dim": 4, "linear_alpha": 2}
LOKR = {"algo": "lokr", "linear_dim": 2, "linear_alpha": 3, "factor": 4}
FULL = {"algo": "lokr", "linear_dim": 10_000, "linear_alpha": 1, "factor": 8}
PAIRS = {"algo": "lokr", "linear_dim": 1, "linear_alpha": 2, "factor": 4, "decompose_both": True}
KINDS = {"loha": LOHA, "lokr": LOKR, "whole": FULL, "pairs": PAIRS}


def lycoris(config: dict[str, object], **more: object) -> AdapterOptions:
    return AdapterOptions(lora_type="lycoris", lycoris_config=config, **more)


def trained(config: dict[str, object], dtype: torch.dtype = torch.float32):
    network = tiny_chroma(dtype)
    result = attach_adapter(network, lycoris(config), attention_names(network), 5, dtype)
    perturb(result.trainable)
    return network, result


def told_anew(tensors: dict[str, Tensor], key: str) -> Tensor:
    """As LyCORIS and ComfyUI rebuild it: alpha / dim, and 1 where both matrices are whole."""
    found = {
        name.removeprefix(f"{key}."): t.double()
        for name, t in tensors.items()
        if name.startswith(key + ".")
    }
    if "hada_w1_a" in found:
        whole = (found["hada_w1_a"] @ found["hada_w1_b"]) * (
            found["hada_w2_a"] @ found["hada_w2_b"]
        )
        return whole * (found["alpha"] / found["hada_w1_b"].shape[0])
    dim = None
    if (w1 := found.get("lokr_w1")) is None:
        w1, dim = found["lokr_w1_a"] @ found["lokr_w1_b"], found["lokr_w1_b"].shape[0]
    if (w2 := found.get("lokr_w2")) is None:
        w2, dim = found["lokr_w2_a"] @ found["lokr_w2_b"], found["lokr_w2_b"].shape[0]
    return torch.kron(w1, w2) * (1.0 if dim is None else found["alpha"] / dim)


def both(
    config: dict[str, object], base: nn.Linear, peft: object
) -> tuple[LycorisLinear, nn.Module]:
    ours, theirs = nn.Sequential(base), nn.Sequential(nn.Linear(24, 40).double())
    theirs[0].load_state_dict(base.state_dict())
    result = attach_adapter(ours, lycoris(config), ["0"], 5, torch.float64)
    perturb(result.trainable)
    inject_adapter_in_model(peft, theirs)
    theirs.double()
    for name, parameter in result.trainable:
        getattr(theirs[0], name.split(".")[-1])["default"].data = parameter.detach().clone()
    return ours[0], theirs[0]


@pytest.mark.parametrize("kind", ["loha", "lokr", "pairs"])
def test_equals_peft_in_output_and_every_gradient(kind):
    config = KINDS[kind]
    dim, alpha = config["linear_dim"], config["linear_alpha"]
    peft = LoHaConfig(r=dim, alpha=alpha, target_modules=["0"])
    if kind != "loha":
        peft = LoKrConfig(
            r=dim,
            alpha=alpha,
            target_modules=["0"],
            decompose_factor=4,
            decompose_both=kind == "pairs",
        )
    torch.manual_seed(0)
    ours, theirs = both(config, nn.Linear(24, 40).double(), peft)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    found = []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_()
        y = layer(given)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        of = (
            layer.factors
            if layer is ours
            else {n: getattr(layer, n)["default"] for n in ours.factors}
        )
        found.append([y.detach(), given.grad, *(of[name].grad for name in ours.factors)])
    for a, b in zip(*found):
        assert (a - b).abs().max() < 1e-12 * b.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_added_to_and_strength_zero_is_the_base(kind):
    torch.manual_seed(0)
    base = QuantizedLinear.from_linear(nn.Linear(64, 128).bfloat16(), "int8")
    network = nn.Sequential(base)
    perturb(attach_adapter(network, lycoris(KINDS[kind]), ["0"], 5).trainable)
    x = torch.randn(7, 64).bfloat16()
    plain = base(x)
    delta = network[0].output_terms(x.double().t())[0].t()
    close = {"rtol": 0.02, "atol": 0.02 * float(delta.abs().max())}
    assert torch.allclose(network(x).double(), plain.double() + delta, **close)
    network(x).float().square().sum().backward()
    assert all(part.grad.dtype == torch.float32 for part in network[0].factors.values())
    set_strength(network, 0.0)
    assert torch.equal(network(x), plain)


@pytest.mark.parametrize("number", [1, 7, 64, 1008, 3072, 12288, 15360])
def test_sides_are_lycoris(number):
    for factor in (-1, 5, 7, 10, 16, 100):
        small, large = theirs_factorization(number, factor)
        assert factorization(number, factor) == (min(small, large), max(small, large))


def test_shapes_at_full_size_and_what_is_drawn():
    """3072 x 15360 with factor 16 and dim 32, as LyCORIS writes it."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(15360, 3072))
    attach_adapter(network, lycoris({"algo": "lokr", "linear_dim": 32, "factor": 16}), ["0"], 5)
    shapes = {name: tuple(part.shape) for name, part in network[0].factors.items()}
    assert shapes == {"lokr_w1": (16, 16), "lokr_w2_a": (192, 32), "lokr_w2_b": (32, 960)}
    network, again = nn.Sequential(nn.Linear(512, 256)), nn.Sequential(nn.Linear(512, 256))
    result = attach_adapter(network, lycoris({"algo": "loha", "linear_dim": 32}), ["0"], 5)
    spread = {name.split(".")[-1]: float(part.detach().std()) for name, part in result.trainable}
    for name, std in {
        "hada_w1_a": 0.1,
        "hada_w1_b": 1.0,
        "hada_w2_a": 0.0,
        "hada_w2_b": 1.0,
    }.items():
        assert spread[name] == pytest.approx(std, rel=0.03), name
    attach_adapter(again, lycoris({"algo": "lokr", "linear_dim": 2}), ["0"], 5)
    assert again[0].factors["lokr_w2_a"].abs().max() <= 1 / math.sqrt(2)
    x = torch.randn(3, 512)
    for one in (network, again):
        assert torch.equal(one(x), one[0].base_layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_lycoris_names_and_acts_the_same_again(kind, tmp_path):
    network, _ = trained(KINDS[kind])
    path = tmp_path / "a.safetensors"
    assert chroma_lora.save_adapter(network, path).kind == ("LoHa" if kind == "loha" else "LoKr")
    tensors = load_file(path)
    name = "transformer_blocks.0.attn.to_q"
    key = f"lycoris_{name.replace('.', '_')}"
    assert {f"{key}.{part}" for part in network.get_submodule(name).factors} | {f"{key}.alpha"} == {
        one for one in tensors if one.startswith(f"{key}.")
    }
    columns = torch.eye(32, dtype=torch.float64)
    for name, module in adapted_modules(network).items():
        live = module.output_terms(columns)[0]
        again = told_anew(tensors, f"lycoris_{name.replace('.', '_')}")
        assert (live - again).abs().max() < 1e-6 * live.abs().max(), name
    shown = tiny_chroma()
    chroma_lora.load_adapter(shown, path)
    assert (run_forward(shown) - run_forward(tiny_chroma())).abs().max() > 0.01
    assert torch.allclose(run_forward(shown), run_forward(network), rtol=0, atol=2e-6)
    set_strength(shown, 0.0)
    assert torch.equal(run_forward(shown), run_forward(tiny_chroma()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_program_does(kind, tmp_path):
    """The two that read LyCORIS' kinds apply them; diffusers' own loader is asked itself."""
    network, _ = trained(KINDS[kind])
    chroma_lora.save_adapter(network, tmp_path / "a.safetensors")
    outcomes = {one.program: one for one in check_compatibility(tmp_path / "a.safetensors")[1]}
    said = {program: (one.outcome, one.modules) for program, one in outcomes.items()}
    assert said == {
        "diffusers": ("refused", 0), "ComfyUI": ("applied", 22), "Forge": ("refused", 0),
        "kohya sd-scripts": ("ignored", 0),
    }  # fmt: skip
    chroma_lora.save_adapter(network, tmp_path / "a.kohya.safetensors", layout="kohya")
    outcomes = {
        one.program: one for one in check_compatibility(tmp_path / "a.kohya.safetensors")[1]
    }
    assert {name for name, one in outcomes.items() if one.outcome == "applied"} == {
        "ComfyUI",
        "Forge",
    }
    assert outcomes["kohya sd-scripts"].why
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        make_pipeline(tiny_chroma()).load_lora_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "prefix", ["lora_unet_", "diffusion_model.", "transformer.", "lora_transformer_", ""]
)
def test_diffusers_takes_no_product_under_any_name(prefix, tmp_path, caplog):
    native, flat = prefix in ("lora_unet_", "diffusion_model."), prefix.endswith("_")
    name = "double_blocks.0.img_attn.proj" if native else "transformer_blocks.0.attn.to_out.0"
    parts = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(8, 8), "alpha": torch.tensor(1.0)}
    key = prefix + (name.replace(".", "_") if flat else name)
    path = tmp_path / "x.safetensors"
    save_file({f"{key}.{part}": tensor for part, tensor in parts.items()}, path)
    verdict = check_compatibility(path)[1][0]
    loaded = tiny_chroma()
    if "lora" in prefix:
        make_pipeline(loaded).load_lora_weights(path)
        assert torch.equal(run_forward(loaded), run_forward(tiny_chroma()))
        assert verdict.outcome == "ignored"
        return
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        make_pipeline(loaded).load_lora_weights(path)
    assert verdict.outcome == "refused"


def test_a_fused_matrix_is_cut_into_rows_and_not_written_in_parts(tmp_path):
    """AI Toolkit and LyCORIS for kohya adapt q, k and v as one."""
    w1, w2 = torch.randn(3, 4), torch.randn(32, 8)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    path = tmp_path / "x.safetensors"
    save_file({f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2, f"{key}.alpha": torch.tensor(9.0)}, path)
    shown, expected = tiny_chroma(), tiny_chroma()
    assert "LoKr 0" in str(chroma_lora.load_adapter(shown, path))
    for number, end in enumerate(("to_q", "to_k", "to_v")):
        rows = torch.kron(w1, w2)[number * 32 : (number + 1) * 32]
        expected.get_submodule(f"transformer_blocks.0.attn.{end}").weight.add_(rows)
    assert torch.allclose(run_forward(shown), run_forward(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="rows of a fused matrix cannot be written as a LoKr"):
        chroma_lora.save_deltas(
            chroma_lora.read_lora_file(path).to_deltas(),
            tmp_path / "y.safetensors",
            "lycoris",
            torch.float32,
            {},
        )
    options = lycoris({**FULL, "factor": 4}, init_lora=str(path))
    names = [f"transformer_blocks.0.attn.{end}" for end in ("to_q", "to_k", "to_v")]
    with pytest.raises(ConfigError, match=r"to_q has .*lycoris_config describes"):
        attach_adapter(tiny_chroma(), options, names, 0)


DAMAGED = {
    "half a pair": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2)},
        "lokr_w2 is neither one matrix nor a pair",
    ),
    "both": (
        {"lokr_w1": (4, 4), "lokr_w2": (8, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
        "neither one",
    ),
    "of both kinds": (
        {"lokr_w1": (4, 4), "lokr_w2": (8, 8), "hada_w1_b": (2, 2)},
        "does not belong to the other factors",
    ),
    "ranks": ({"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (3, 8)}, "do not fit lokr_w2"),
    "four sides": ({"lokr_w1": (4, 4, 1, 1), "lokr_w2": (8, 8)}, "do not fit lokr_w1"),
    "nothing": ({"lokr_w1": (0, 4), "lokr_w2": (8, 8)}, "do not fit lokr_w1"),
    "sizes": (
        {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 16)},
        "w1 and w2 differ in size",
    ),
    "two kinds": (
        {"lokr_w1": (4, 4), "lokr_w2": (8, 8), "lora_up.weight": (4, 4)},
        "lora_up.weight belongs",
    ),
    "magnitude": (
        {"lokr_w1": (4, 4), "lokr_w2": (8, 8), "dora_scale": (32, 1)},
        "dora_scale belongs",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_one_line(case, tmp_path):
    shapes, match = DAMAGED[case]
    key = "lycoris_transformer_blocks_0_attn_to_q"
    save_file(
        {f"{key}.{part}": torch.ones(shape) for part, shape in shapes.items()},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(ModelError, match=match):
        chroma_lora.read_lora_file(tmp_path / "x.safetensors").to_deltas()


def test_a_file_that_would_act_differently_never_gets_its_name(tmp_path, monkeypatch):
    network, _ = trained(LOKR)
    honest = lora_io._delta_tensors

    def twice_as_strong(*given):
        return {
            key: value * (2 if key.endswith("alpha") else 1)
            for key, value in honest(*given).items()
        }

    monkeypatch.setattr(lora_io, "_delta_tensors", twice_as_strong)
    with pytest.raises(ModelError, match="would be applied differently"):
        chroma_lora.save_adapter(network, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(ModelError, match="LoKr"):
        chroma_lora.save_adapter(network, tmp_path / "a.safetensors", layout="diffusers")


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", ["all", "some parts of fused matrices"])
def test_native_names_hold_the_same_delta(kind, layout, chosen, tmp_path):
    """LyCORIS' own formula on the tensors of the file, against the network's deltas."""
    network = tiny_chroma()
    names = attention_names(network)
    if chosen != "all":
        names = [name for name in names if not name.endswith(("to_k", "add_v_proj"))]
    result = attach_adapter(network, lycoris(KINDS[kind]), names, 5)
    perturb(result.trainable)
    path = tmp_path / "a.safetensors"
    chroma_lora.save_adapter(network, path, layout=layout)
    expected = {
        name: module.to_delta().to_dense() for name, module in adapted_modules(network).items()
    }
    stored = load_file(path)
    keys = {key.rsplit(".", 1)[0] for key in stored}
    assert all(key.startswith(("lora_unet_", "diffusion_model.")) for key in keys)
    found = {}
    for key in keys:
        part = {
            name[len(key) + 1 :]: value.double()
            for name, value in stored.items()
            if name.startswith(f"{key}.")
        }
        alpha = part.pop("alpha")
        if "hada_w1_a" in part:
            rank = part["hada_w1_b"].shape[0]
            assert part["hada_w2_b"].shape[0] == rank, "programs divide alpha by either"
            whole = (part["hada_w1_a"] @ part["hada_w1_b"]) * (
                part["hada_w2_a"] @ part["hada_w2_b"]
            )
            whole = whole * alpha / rank
        else:
            w1 = part.get("lokr_w1")
            w1 = w1 if w1 is not None else part["lokr_w1_a"] @ part["lokr_w1_b"]
            scale = alpha / part["lokr_w2_b"].shape[0] if "lokr_w2_b" in part else 1.0
            if "lokr_w2_b" not in part and "lokr_w1_b" in part:
                scale = alpha / part["lokr_w1_b"].shape[0]
            w2 = part["lokr_w2"] if "lokr_w2" in part else part["lokr_w2_a"] @ part["lokr_w2_b"]
            whole = torch.kron(w1.contiguous(), w2.contiguous()) * scale
        dotted = key.removeprefix("diffusion_model.")
        if layout == "kohya":
            dotted = NAMES.underscores_to_dots(key.removeprefix("lora_unet_"), True)
        rows = NAMES.fused_row_slices(dotted, *whole.shape)
        found |= {name: whole[part] for name, part in zip(NAMES.diffusers_names(dotted), rows)}
    for name, delta in found.items():
        if name in expected:
            scale = expected[name].abs().max()
            assert (delta - expected[name]).abs().max() <= 1e-6 * scale, name
        else:
            assert not delta.any()
    assert found.keys() >= expected.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_file_at_another_strength(kind, tmp_path):
    network, _ = trained(KINDS[kind])
    path = tmp_path / "a.safetensors"
    chroma_lora.save_adapter(network, path)
    again = tiny_chroma()
    options = lycoris({**KINDS[kind], "linear_alpha": 7}, init_lora=str(path))
    result = attach_adapter(again, options, attention_names(again), 5)
    assert torch.allclose(run_forward(again), run_forward(network), rtol=0, atol=4e-6)
    run_forward(again).square().sum().backward()
    assert all(part.grad is not None for _, part in result.trainable)
    other = lycoris({**LOHA, "linear_dim": 3}, init_lora=str(path))
    with pytest.raises(ConfigError, match="lycoris_config"):
        attach_adapter(tiny_chroma(), other, attention_names(tiny_chroma()), 5)
    with pytest.raises(ConfigError, match='set lora_type = "lycoris"'):
        attach_adapter(
            tiny_chroma(), AdapterOptions(init_lora=str(path)), attention_names(tiny_chroma()), 5
        )


@pytest.mark.parametrize("native", [False, True])
def test_the_nearest_lora_errs_as_much_as_it_says(native, tmp_path):
    network = tiny_chroma()
    names = preset_targets(network, "all+ffs")
    perturb(attach_adapter(network, lycoris(LOKR), names, 5).trainable)
    chroma_lora.save_adapter(network, tmp_path / "a.safetensors")
    whole = chroma_lora.read_lora_file(tmp_path / "a.safetensors").to_deltas()
    near, error = chroma_lora.truncate_rank(whole, 6, native)
    lost = total = 0.0
    for name, one in whole.items():
        assert isinstance(one, LycorisDelta)
        lost += float((one.to_dense() - near[name].up @ near[name].down).square().sum())
        total += float(one.to_dense().square().sum())
    assert 0.05 < error < 0.9
    assert error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    layout = "kohya" if native else "diffusers"
    chroma_lora.save_deltas(near, tmp_path / "b.safetensors", layout, torch.float32, {})
    doubled = merge_deltas.sum_weighted_loras([(whole, 2.0)])
    for name, one in doubled.items():
        assert torch.allclose(one.to_dense(), 2 * whole[name].to_dense(), rtol=1e-5)
    with pytest.raises(ModelError, match="cannot be added"):
        merge_deltas.sum_weighted_loras([(whole, 1.0), (whole, 1.0)])

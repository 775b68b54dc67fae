"""Every layout is read as what it is meant to do; fused and split names into each other, exactly."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.adapters.deltas import LowRankDelta
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ModelError
from simpletuner.models.weights.merge_loras import _merge_tensor
from tests.adapters import chroma_lora
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.layout_files import (
    AB,
    DOWN_UP,
    make_all_layouts,
    numbered,
    split_factors,
    underscored,
)
from tests.adapters.tiny_network import tiny_chroma

WIDTH = 32
ROWS = tuple(make_all_layouts(8))


def written(held, path):
    save_file(held.tensors, path, metadata={"format": "pt", **held.header})
    return path


@pytest.mark.parametrize("row", ROWS)
def test_every_layout_is_read_as_it_is_meant(row, tmp_path):
    held = make_all_layouts(WIDTH, rank=4, alpha=2.0)[row]
    factors, summary = chroma_lora.read_lora_file(
        written(held, tmp_path / "x.safetensors")
    ).to_deltas_and_summary()
    assert set(factors) == set(held.expected_deltas) == set(summary.modules)
    assert summary.ranks == (4,)
    assert summary.alphas == ((4.0,) if row == "diffusers" else (2.0,))
    for name, (a, b, strength) in held.expected_deltas.items():
        assert torch.allclose(
            factors[name].up @ factors[name].down, strength * (b @ a), rtol=1e-6, atol=1e-5
        )
    assert "17 modules" in str(summary)
    assert "rank 4" in str(summary)


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("row", ["diffusers", "kohya"])
def test_there_and_back_is_the_identity(row, layout, tmp_path):
    """From split names the fused pair is block-diagonal; from fused names A is one, and so it
    stays.
    """
    held = make_all_layouts(WIDTH, rank=4, alpha=4.0)[row]
    before = chroma_lora.read_lora_file(written(held, tmp_path / "x.safetensors")).to_deltas()
    chroma_lora.save_deltas(before, tmp_path / "y.safetensors", layout, torch.float32, {})
    stored = chroma_lora.read_lora_file(tmp_path / "y.safetensors")
    ranks = {name.split(".", 2)[2]: one.rank for name, one in stored.modules.items()}
    assert (
        ranks["img_attn.qkv"] == (12 if row == "diffusers" else 4)
        if "img_attn.qkv" in ranks
        else True
    )
    assert {one.rank for name, one in stored.modules.items() if name.endswith("linear1")} == {
        16 if row == "diffusers" else 4
    }
    after = stored.to_deltas()
    assert set(after) == set(before)
    for name in before:
        assert torch.equal(after[name].down, before[name].down)
        assert torch.equal(after[name].up, before[name].up)


def test_modules_that_are_not_adapted_stay_so(tmp_path):
    """The default target leaves proj_mlp out, of which no tensor then tells the height."""
    wanted = ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.attn.to_v")
    kept = {
        name: LowRankDelta(*pair)
        for name, pair in split_factors(WIDTH, 4).items()
        if name in wanted
    }
    chroma_lora.save_deltas(kept, tmp_path / "x.safetensors", "kohya", torch.float32, {})
    stored = chroma_lora.read_lora_file(tmp_path / "x.safetensors")
    assert {name: (one.delta.shape[0], one.rank) for name, one in stored.modules.items()} == {
        "double_blocks.0.img_attn.qkv": (3 * WIDTH, 4),
        "single_blocks.0.linear1": (7 * WIDTH, 4),
    }
    assert stored.to_deltas().keys() == kept.keys()
    for name, one in stored.to_deltas().items():
        assert torch.equal(one.up @ one.down, kept[name].up @ kept[name].down)


def test_unequal_ranks_and_outer_modules_fit_the_native_names(tmp_path):
    pairs = split_factors(WIDTH, 4)
    kept = {name: LowRankDelta(*pair) for name, pair in pairs.items()}
    kept["transformer_blocks.0.attn.to_q"] = LowRankDelta(
        torch.randn(2, WIDTH), torch.randn(WIDTH, 2)
    )
    chroma_lora.save_deltas(kept, tmp_path / "x.safetensors", "comfyui", torch.float32, {})
    after = chroma_lora.read_lora_file(tmp_path / "x.safetensors").to_deltas_and_summary()
    assert after[1].ranks == (2, 4)
    for name, one in after[0].items():
        assert torch.equal(one.down, kept[name].down)
    outer = {"proj_out": LowRankDelta(torch.randn(4, WIDTH), torch.randn(64, 4))}
    chroma_lora.save_deltas(outer, tmp_path / "y.safetensors", "comfyui", torch.float32, {})
    assert chroma_lora.read_lora_file(tmp_path / "y.safetensors").to_deltas().keys() == {"proj_out"}
    with pytest.raises(ModelError, match=r"not be applied to proj_out .* by kohya"):
        chroma_lora.save_deltas(outer, tmp_path / "z.safetensors", "kohya", torch.float32, {})


def test_an_untrained_lora_keeps_its_rank(tmp_path):
    fresh = {
        name: LowRankDelta(a, torch.zeros_like(b))
        for name, (a, b) in split_factors(WIDTH, 4).items()
    }
    for layout in ("kohya", "comfyui"):
        chroma_lora.save_deltas(
            fresh, tmp_path / f"{layout}.safetensors", layout, torch.float32, {}
        )


def test_dora_scale_is_a_magnitude_per_output_or_per_input(tmp_path):
    name, (a, b) = next(iter(split_factors(WIDTH, 4).items()))
    tensors = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    scale = torch.rand(WIDTH, 1)
    save_file({**tensors, f"transformer.{name}.dora_scale": scale}, tmp_path / "x.safetensors")
    assert torch.equal(
        chroma_lora.read_lora_file(tmp_path / "x.safetensors").to_deltas()[name].magnitude,
        scale.flatten(),
    )
    save_file(
        {**tensors, f"transformer.{name}.dora_scale": scale.t().contiguous()},
        tmp_path / "x.safetensors",
    )
    delta = chroma_lora.read_lora_file(tmp_path / "x.safetensors").to_deltas()[name]
    assert delta.magnitude.shape == (1, WIDTH)


KEY = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_A.weight": (4, 8), "lora_B.weight": (8, 5)}, "are not a LoRA pair"),
        ({"lora_A.weight": (0, 8), "lora_B.weight": (8, 0)}, "are not a LoRA pair"),
        ({"lora_A.weight": (4, 8, 1), "lora_B.weight": (8, 4)}, "are not a LoRA pair"),
        (
            {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "alpha": (2,)},
            "is not a finite number",
        ),
        (
            {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "lora_magnitude_vector": (3,)},
            r"shape \(3,\), not \(8,\)",
        ),
        ({"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "dora_scale": ()}, "no rows"),
    ],
)
def test_sizes_that_are_no_lora(tensors, said, tmp_path):
    save_file(
        {f"{KEY}.{end}": torch.ones(shape) for end, shape in tensors.items()},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(ModelError, match=said):
        chroma_lora.read_lora_file(tmp_path / "x.safetensors")
    fused = {
        f"lora_unet_single_blocks_0_linear1.lora_{end}.weight": torch.ones(4, 4)
        for end in ("down", "up")
    }
    save_file(fused, tmp_path / "y.safetensors")
    with pytest.raises(ModelError, match="trained on another model"):
        chroma_lora.read_lora_file(tmp_path / "y.safetensors").to_deltas()


@pytest.mark.parametrize(
    "config",
    ["[1]", "[" * 100_000, '{"transformer.lora_alpha": "x"}', '{"transformer.lora_alpha": NaN}',
     '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": 3}'],
)  # fmt: skip
def test_headers_that_are_no_configuration(config, tmp_path):
    pair = {f"{KEY}.lora_A.weight": torch.ones(4, 8), f"{KEY}.lora_B.weight": torch.ones(8, 4)}
    save_file(pair, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": config})
    with pytest.raises(ModelError, match="header"):
        chroma_lora.read_lora_file(tmp_path / "x.safetensors").to_deltas()


def test_a_pattern_of_a_stranger_is_not_run(tmp_path):
    """As a regular expression this one would take until the end of the world."""
    slow = {
        "transformer.lora_alpha": 8,
        "transformer.r": 4,
        "transformer.alpha_pattern": {"(([a-z_.0-9]+)+)+!": 1},
    }
    pair = {f"{KEY}.lora_A.weight": torch.ones(4, 8), f"{KEY}.lora_B.weight": torch.ones(8, 4)}
    save_file(
        pair, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(slow)}
    )
    assert (
        float(chroma_lora.read_lora_file(tmp_path / "x.safetensors").to_deltas()[KEY[12:]].up[0, 0])
        == 2.0
    )


class Trap:
    opened = False

    def __reduce__(self):
        return (setattr, (Trap, "opened", True))


def test_pickles_are_never_opened(tmp_path):
    for number, data in enumerate((pickle.dumps(Trap()), pickle.dumps(Trap(), protocol=2))):
        (tmp_path / f"{number}.safetensors").write_bytes(data)
        with pytest.raises(ModelError, match=r"pickle.* can run code"):
            chroma_lora.read_lora_file(tmp_path / f"{number}.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match="pickle in a zip"):
        chroma_lora.read_lora_file(tmp_path / "x.pt")
    assert not Trap.opened


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{",
     struct.pack("<Q", 2) + b"[]",
     struct.pack("<Q", 10) + b"{" * 10, b"GGUF\x03\x00\x00\x00" + bytes(40), b"<html>" + bytes(40),
     b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
)  # fmt: skip
def test_other_kinds_of_file(data, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"readable safetensors|holds no LoRA"):
        chroma_lora.read_lora_file(tmp_path / "x.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_of_any_kind_is_told_as_such(tmp_path_factory, data):
    """Bytes changed, cut or repeated anywhere in a good file: it is read, or it is a ModelError."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    row = data.draw(st.sampled_from(ROWS))
    held = make_all_layouts(8, rank=2, alpha=1.0)[row]
    held.tensors = dict(list(held.tensors.items())[:6])
    content = bytearray(written(held, path).read_bytes())
    length = struct.unpack("<Q", content[:8])[0] + 8
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(content), length) - 1))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                content[place] = data.draw(st.integers(0, 255))
            case "cut":
                del content[place : place + data.draw(st.integers(1, 40))]
            case "insert":
                content[place:place] = data.draw(st.binary(min_size=1, max_size=40))
    path.write_bytes(content)
    with contextlib.suppress(ModelError):  # anything else is the failure
        chroma_lora.read_lora_file(path).to_deltas_and_summary()


def write_dora(
    path: Path, layout: str, per_input: bool
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A DoRA as OneTrainer writes it, of attention; module -> (A, B scaled by alpha / rank, norms)."""
    generator = torch.Generator().manual_seed(4)
    key = {
        "diffusers": lambda name: f"transformer.{name}",
        "onetrainer": lambda name: f"lora_transformer_{underscored(name)}",
        "original": numbered,
    }[layout]
    ends, suffix = (
        (DOWN_UP, "dora_scale") if layout != "diffusers" else (AB, "lora_magnitude_vector.weight")
    )
    tensors, meant = {}, {}
    for name, (a, b) in split_factors(32, 4).items():
        if ".attn." not in name:
            continue
        shape = (1, a.shape[1]) if per_input else (b.shape[0], 1)
        norms = torch.rand(shape, generator=generator) + 0.5
        tensors |= {
            f"{key(name)}.{ends[0]}.weight": a,
            f"{key(name)}.{ends[1]}.weight": b,
            f"{key(name)}.alpha": torch.tensor(2.0),
            f"{key(name)}.{suffix}": norms,
        }
        meant[name] = (a, b / 2, norms)
    save_file(tensors, path)
    return meant


@pytest.mark.parametrize("per_input", [True, False])
@pytest.mark.parametrize("layout", ["diffusers", "onetrainer", "original"])
def test_a_dora_of_onetrainer_is_exact_against_its_formula(
    tmp_path: Path, layout: str, per_input: bool
) -> None:
    """Read, trained on and merged; W' = m (W + dW) / |W + dW| by rows or by columns."""
    path = tmp_path / "dora.safetensors"
    meant = write_dora(path, layout, per_input)
    network = tiny_chroma().double()
    bases = {name: module for name, module in network.named_modules() if name in meant}
    weights = {name: module.weight.detach().clone() for name, module in bases.items()}
    closed = {}
    for name, (a, b, norms) in meant.items():
        adapted = weights[name] + b.double() @ a.double()
        closed[name] = adapted * norms / adapted.norm(dim=0 if per_input else 1, keepdim=True)
    x = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = {
        name: x @ closed[name].t() + (0 if bases[name].bias is None else bases[name].bias)
        for name in meant
    }
    attached = tiny_chroma().double()
    chroma_lora.load_adapter(attached, path)
    options = AdapterOptions(lora_rank=4, lora_alpha=1.0, use_dora=True, init_lora=str(path))
    trained = tiny_chroma().double()
    names = list(meant)
    attach_adapter(trained, options, names, 0)
    for built in (attached.double(), trained.double()):
        for name in meant:
            got = built.get_submodule(name)(x)
            assert (got - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name
    deltas = chroma_lora.read_lora_file(path).to_deltas()
    for name in meant:
        stored = StoredTensorOf(weights[name])
        merged = _merge_tensor(f"{name}.weight", stored, [(deltas, 1.0)])
        assert (merged - closed[name]).abs().max() <= 1e-6 * closed[name].abs().max(), name
    chroma_lora.save_adapter(trained.float(), tmp_path / "again.safetensors")
    again = chroma_lora.read_lora_file(tmp_path / "again.safetensors").to_deltas()
    for name in meant:
        assert torch.equal(again[name].magnitude, deltas[name].magnitude)
    applied = {
        program
        for program, one in zip(
            chroma_lora.CONSUMER_PROGRAMS,
            chroma_lora.check_compatibility(tmp_path / "again.safetensors")[1],
        )
        if one.outcome == "applied"
    }
    assert applied == ({"comfyui", "comfyui-0.8.0"} if per_input else {"diffusers"})


class StoredTensorOf:
    """A tensor of a base, as merging reads it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def load(self) -> Tensor:
        return self._tensor


def test_columns_of_a_fused_matrix_cannot_be_split(tmp_path: Path) -> None:
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {
            f"{key}.lora_down.weight": torch.ones(2, 32),
            f"{key}.lora_up.weight": torch.ones(96, 2),
            f"{key}.dora_scale": torch.ones(1, 32),
        },
        tmp_path / "x.safetensors",
    )
    with pytest.raises(ModelError, match="columns of a fused matrix"):
        chroma_lora.read_lora_file(tmp_path / "x.safetensors").to_deltas()

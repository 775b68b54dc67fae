"""The rules written down for each program, against diffusers itself and the others' rules told
anew.
"""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.adapters import compatibility, layouts
from simpletuner.adapters.deltas import LowRankDelta
from tests.adapters import chroma_lora
from tests.adapters.chroma_lora import check_compatibility
from tests.adapters.layout_files import (
    AB,
    DOWN_UP,
    NATIVE_MODULES,
    LayoutFile,
    make_all_layouts,
    make_diffusers_file,
    make_native_file,
    split_factors,
    underscored,
)
from tests.adapters.tiny_network import make_pipeline

RANK, ALPHA = 2, 1.0
FULL, SMALL = 3072, 16


def more(width: int) -> dict[str, LayoutFile]:
    """Files besides the twelve that fall under another rule."""
    mixed = make_diffusers_file(
        lambda n: f"lora_transformer_{underscored(n)}", DOWN_UP, ALPHA, width, RANK
    )
    mixed.tensors = {key: value for key, value in mixed.tensors.items() if "_attn_" in key}
    mixed.expected_deltas = {
        name: value for name, value in mixed.expected_deltas.items() if ".attn." in name
    }
    deep = make_native_file(
        lambda n: f"lora_unet_{underscored(n).replace('_0_', '_38_', 1)}",
        DOWN_UP,
        ALPHA,
        width,
        RANK,
    )
    deep.expected_deltas = {
        name.replace(".0.", ".38.", 1): value for name, value in deep.expected_deltas.items()
    }
    outer = {
        "lora_unet_img_in": ("x_embedder", width, 64),
        "lora_unet_final_layer_linear": ("proj_out", 64, width),
    }
    around = make_native_file(lambda n: f"lora_unet_{underscored(n)}", DOWN_UP, ALPHA, width, RANK)
    for key, (name, rows, columns) in outer.items():
        a, b = torch.randn(RANK, columns), torch.randn(rows, RANK)
        ends = {".lora_down.weight": a, ".lora_up.weight": b, ".alpha": torch.tensor(ALPHA)}
        around.tensors |= {key + end: value for end, value in ends.items()}
        around.expected_deltas[name] = (a, b, ALPHA / RANK)
    return {
        "transformer-kohya without alpha": make_diffusers_file(
            lambda n: f"transformer.{n}", DOWN_UP, None, width, RANK
        ),
        "kohya without alpha": make_native_file(
            lambda n: f"lora_unet_{underscored(n)}", DOWN_UP, None, width, RANK
        ),
        "onetrainer attention": mixed,
        "onetrainer without alpha": make_diffusers_file(
            lambda n: f"lora_transformer_{underscored(n)}", DOWN_UP, None, width, RANK
        ),
        "bare without alpha": make_diffusers_file(lambda n: n, AB, None, width, RANK),
        "kohya too deep": deep,
        "kohya outside the blocks": around,
    }


def files_of(width: int) -> dict[str, LayoutFile]:
    return {**make_all_layouts(width, RANK, ALPHA), **more(width)}


ROWS = tuple(files_of(SMALL))


def applied_by(program: str, path) -> dict[str, LowRankDelta]:
    return compatibility.applied_deltas(
        chroma_lora.CONSUMER_PROGRAMS[program], chroma_lora.read_lora_file(path)
    )


def verdict_of(program: str, path):
    return dict(zip(chroma_lora.CONSUMER_PROGRAMS, check_compatibility(path)[1], strict=True))[
        program
    ]


def write(held: LayoutFile, path):
    save_file(held.tensors, path, metadata={"format": "pt", **held.header})
    return path


def expected_outcome(found: dict[str, Tensor], meant: dict[str, Tensor]) -> tuple[str, int]:
    """From the deltas alone. found, meant: module -> a product of the delta, or the delta."""
    close = {
        name
        for name in set(found) & set(meant)
        if (found[name] - meant[name]).abs().max() <= 1e-6 * meant[name].abs().max()
    }
    reached = {name for name, value in found.items() if bool(value.any())}
    if not reached:
        return "ignored", 0
    if close != reached:
        return "wrong strength", len(close)
    return ("applied" if close == set(meant) else "in part"), len(close)


class Diffusers:
    """The real loader, on a Chroma of one block of each kind. Its weights are never touched: no
    memory.
    """

    def __init__(self, width: int) -> None:
        with torch.device("meta"):
            model = ChromaTransformer2DModel(
                num_layers=1, num_single_layers=1, num_attention_heads=width // 16, attention_head_dim=16,
                axes_dims_rope=(4, 6, 6), approximator_layers=1, approximator_hidden_dim=16,
            )  # fmt: skip
        self.model = model.to_empty(device="cpu")

    def load(self, path) -> dict[str, LowRankDelta] | Exception:
        pipe = make_pipeline(self.model)
        try:
            pipe.load_lora_weights(path, adapter_name="x")
        except (ValueError, KeyError, AssertionError) as error:
            return error
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                down, up = module.lora_A["x"].weight.detach(), module.lora_B["x"].weight.detach()
                found[name] = LowRankDelta(down.clone(), up * module.scaling["x"])
        pipe.unload_lora_weights()
        return found


@pytest.fixture(scope="module")
def full() -> Diffusers:
    return Diffusers(FULL)


@pytest.fixture(scope="module")
def small() -> Diffusers:
    return Diffusers(SMALL)


def products(factors: dict[str, LowRankDelta]) -> dict[str, Tensor]:
    found = {}
    for name, one in factors.items():
        probes = torch.randn(
            one.down.shape[1], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        found[name] = one.up.double() @ (one.down.double() @ probes)
    return found


def compare_with_diffusers(
    path, real: dict[str, LowRankDelta] | Exception, meant: dict[str, LowRankDelta]
) -> None:
    said = verdict_of("diffusers", path)
    if isinstance(real, Exception):
        assert said.outcome == "refused"
        assert said.why.startswith(type(real).__name__)
        assert applied_by("diffusers", path) == {}
        return
    ours, theirs = products(applied_by("diffusers", path)), products(real)
    assert ours.keys() == {name for name, value in theirs.items() if value.any()}
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max() <= 1e-6 * theirs[name].abs().max(), name
    outcome, count = expected_outcome(theirs, products(meant))
    assert (said.outcome, said.modules, said.of) == (outcome, count, len(meant))


def meant_by(held: LayoutFile) -> dict[str, LowRankDelta]:
    return {
        name: LowRankDelta(a, b * strength)
        for name, (a, b, strength) in held.expected_deltas.items()
    }


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("width", [FULL, SMALL])
def test_diffusers_does_what_is_written_of_it(row, width, full, small, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, logger="diffusers")
    held = files_of(width)[row]
    path = write(held, tmp_path / "x.safetensors")
    compare_with_diffusers(path, (full if width == FULL else small).load(path), meant_by(held))


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfyui"])
def test_diffusers_applies_every_layout_that_is_written(layout, full, tmp_path):
    factors = {name: LowRankDelta(a, b / 3) for name, (a, b) in split_factors(FULL, RANK).items()}
    path = tmp_path / "x.safetensors"
    chroma_lora.save_deltas(factors, path, layout, torch.float32, {})
    real = full.load(path)
    compare_with_diffusers(path, real, factors)
    assert verdict_of("diffusers", path).outcome == "applied"
    assert real.keys() == factors.keys()


class Comfy:
    """ComfyUI's rules told anew: a map of names to slices of native weights, and factors by their
    endings.
    """

    def __init__(self, width: int, with_bare: bool = True, native_only: bool = False) -> None:
        self.shapes = {
            **{name: (sum(counts) * width, columns * width) for name, (_, counts, columns) in NATIVE_MODULES.items()},  # noqa: E501
            "img_in": (width, 64), "final_layer.linear": (64, width),
        }  # fmt: skip
        self.places: dict[str, tuple[str, int, int]] = {}
        self.native_only = native_only
        outer = {"x_embedder": "img_in", "proj_out": "final_layer.linear"}
        for name, (rows, _) in self.shapes.items():
            for key in (f"lora_unet_{name.replace('.', '_')}", f"diffusion_model.{name}"):
                self.places[key] = (name, 0, rows)
        for native, (parts, counts, _) in NATIVE_MODULES.items():
            start = 0
            for part, count in zip(parts, counts):
                self._diffusers(part, (native, start, count * width), with_bare)
                start += count * width
        for part, native in outer.items():
            self._diffusers(part, (native, 0, self.shapes[native][0]), with_bare)

    def _diffusers(self, part: str, place: tuple[str, int, int], with_bare: bool) -> None:
        if self.native_only:
            return
        under = part.replace(".", "_")
        keys = [f"transformer.{part}", f"lycoris_{under}", f"lora_transformer_{under}"]
        for key in [*keys, part] if with_bare else keys:
            self.places[key] = place

    def load(self, path) -> tuple[dict[str, Tensor], int]:
        """Native weight -> what is added to it; and how many keys fit nothing."""
        file, used = load_file(path), set()
        deltas = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        for key, (native, start, rows) in self.places.items():
            for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
                if f"{key}.{up}.weight" in file:
                    b, a = file[f"{key}.{up}.weight"], file[f"{key}.{down}.weight"]
                    alpha = file.get(f"{key}.alpha")
                    scale = 1.0 if alpha is None else alpha.item() / a.shape[0]
                    deltas[native][start : start + rows] += scale * (b @ a)
                    used |= {f"{key}.{up}.weight", f"{key}.{down}.weight", f"{key}.alpha"}
        return deltas, len(set(file) - used)


def by_module(deltas: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Native deltas cut into diffusers' modules; the untouched left out."""
    found = {"x_embedder": deltas["img_in"], "proj_out": deltas["final_layer.linear"]}
    for native, (parts, counts, _) in NATIVE_MODULES.items():
        start = 0
        for part, count in zip(parts, counts):
            found[part] = deltas[native][start : start + count * width]
            start += count * width
    return {name: delta for name, delta in found.items() if delta.any()}


def compare(program: str, path, theirs: dict[str, Tensor], held: LayoutFile, refused: bool) -> None:
    said = verdict_of(program, path)
    ours = {name: one.up @ one.down for name, one in applied_by(program, path).items()}
    if refused:
        assert said.outcome == "refused"
        assert ours == {}
        return
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        assert torch.allclose(delta, theirs[name], rtol=1e-6, atol=1e-5), name
    meant = {name: strength * (b @ a) for name, (a, b, strength) in held.expected_deltas.items()}
    outcome, count = expected_outcome(theirs, meant)
    assert (said.outcome, said.modules, said.of) == (outcome, count, len(meant))
    if outcome == "wrong strength":
        name = next(iter(theirs))
        assert said.strength == pytest.approx(
            float((theirs[name] / meant[name]).median()), rel=1e-4
        )


# A network of more blocks than two would be needed for this one.
SHALLOW = tuple(row for row in ROWS if row != "kohya too deep")


@pytest.mark.parametrize("row", SHALLOW)
def test_comfyui_does_what_is_written_of_it(row, tmp_path):
    held = files_of(SMALL)[row]
    path = write(held, tmp_path / "x.safetensors")
    deltas, _ = Comfy(SMALL).load(path)
    compare("comfyui", path, by_module(deltas, SMALL), held, refused=False)


@pytest.mark.parametrize("row", SHALLOW)
def test_an_older_comfyui_does_what_is_written_of_it(row, tmp_path):
    held = files_of(SMALL)[row]
    path = write(held, tmp_path / "x.safetensors")
    deltas, _ = Comfy(SMALL, with_bare=False).load(path)
    compare("comfyui-0.8.0", path, by_module(deltas, SMALL), held, refused=False)


@pytest.mark.parametrize("row", SHALLOW)
@pytest.mark.parametrize("few", [False, True])
def test_forge_does_what_is_written_of_it(row, few, tmp_path):
    held = files_of(SMALL)[row]
    if few:  # a file so small that twelve unmatched keys are not exceeded
        kept = [
            name
            for name in held.expected_deltas
            if name.endswith((".attn.to_out.0", ".attn.to_add_out"))
        ]
        ends = ("to_out.0", "to_out_0", "to_add_out", "attn.proj", "attn_proj")
        held.tensors = {
            key: value for key, value in held.tensors.items() if any(end in key for end in ends)
        }
        held.expected_deltas = {name: held.expected_deltas[name] for name in kept}
    path = write(held, tmp_path / "x.safetensors")
    deltas, unmatched = Comfy(SMALL, native_only=True).load(path)
    compare("forge", path, by_module(deltas, SMALL), held, refused=unmatched > 12)


@pytest.mark.parametrize("row", SHALLOW)
def test_kohya_does_what_is_written_of_it(row, tmp_path):
    """sd-scripts: the part before the first dot is the module; ranks by lora_down, each with an
    alpha.
    """
    held = files_of(SMALL)[row]
    path = write(held, tmp_path / "x.safetensors")
    file, deltas, refused = load_file(path), Comfy(SMALL).load(path)[0], False
    ranks = {key.split(".")[0]: value.shape[0] for key, value in file.items() if "lora_down" in key}
    alphas = {key.split(".")[0]: value.item() for key, value in file.items() if "alpha" in key}
    for native in deltas:
        name = "lora_unet_" + native.replace(".", "_")
        deltas[native].zero_()
        if name in ranks and native in NATIVE_MODULES:
            refused |= name not in alphas
            scale = alphas.get(name, 0) / ranks[name]
            deltas[native] += scale * (
                file[f"{name}.lora_up.weight"] @ file[f"{name}.lora_down.weight"]
            )
    compare("kohya", path, by_module(deltas, SMALL), held, refused)


@pytest.mark.parametrize(
    ("layout", "key", "dora", "right"),
    [
        ("diffusers", "transformer.{}", "lora_magnitude_vector", {"diffusers"}),
        ("diffusers", "transformer.{}", "dora_scale", set()),
        ("bare", "{}", "lora_magnitude_vector", set()),
    ],
)
def test_a_dora_is_applied_as_trained_by_diffusers_alone(layout, key, dora, right, tmp_path):
    held = make_diffusers_file(key.format, AB, None, SMALL, RANK)
    for name in held.expected_deltas:
        held.tensors[f"{key.format(name)}.{dora}"] = torch.ones(
            held.expected_deltas[name][1].shape[0]
        )
    file, verdicts = check_compatibility(write(held, tmp_path / "x.safetensors"))
    assert file.layout == layout
    assert {one.program for one in verdicts if one.outcome == "applied"} == right


def test_every_rule_has_its_source_and_every_layout_its_rule():
    for program in chroma_lora.CONSUMER_PROGRAMS.values():
        assert set(program.rules) == set(layouts.LAYOUTS)
        assert ".py" in program.source or "." in program.source
        assert program.version
        assert all(rule.reason for rule in program.rules.values() if rule.outcome != "applied")

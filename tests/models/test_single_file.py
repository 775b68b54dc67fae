from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import MissingExtra, ModelError
from simpletuner.models.chroma import model_files, native_names, weights
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.quantization import convert
from tests.models import single_files
from tests.models.single_files import StateDict

CPU = torch.device("cpu")
CAPTIONS = ["a red square", "blue"]


@pytest.fixture(scope="module")
def state(checkpoint: Path) -> StateDict:
    return single_files.diffusers_state(checkpoint)


@pytest.fixture(scope="module")
def told(checkpoint: Path) -> dict[str, str]:
    return native_names.config_metadata(weights.read_transformer_config(checkpoint / "transformer"))


def same(found: torch.nn.Module, expected: StateDict) -> bool:
    state = found.state_dict()
    return state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in state
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("names", ["native", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_files_are_read_to_the_bit(
    state: StateDict,
    told: dict[str, str],
    tmp_path: Path,
    prefix: str,
    names: str,
    dtype: torch.dtype,
) -> None:
    cast = {name: tensor.to(dtype) for name, tensor in state.items()}
    held = single_files.native_state(cast) if names == "native" else cast
    file = single_files.write_safetensors(
        tmp_path / "c.safetensors", {prefix + name: one for name, one in held.items()}, told
    )
    found = weights.load_transformer(file, CPU, dtype)
    assert same(found, cast)
    assert found.config == weights.TransformerConfig.from_dict(
        json.loads(told[native_names.CONFIG_METADATA_KEY]), ""
    )


@pytest.mark.parametrize(
    ("dtype", "scaled"),
    [
        (torch.float8_e4m3fn, False),
        (torch.float8_e5m2, False),
        (torch.float8_e4m3fn, True),
        (torch.float8_e4m3fn, "rows"),
    ],
)
def test_fp8_is_multiplied_out(
    state: StateDict, told: dict[str, str], tmp_path: Path, dtype: torch.dtype, scaled: bool | str
) -> None:
    held = single_files.to_fp8(single_files.native_state(state), dtype, scaled)
    file = single_files.write_safetensors(tmp_path / "c.safetensors", held, told)
    found = weights.load_transformer(file, CPU, torch.bfloat16).state_dict()
    for name, tensor in single_files.dequantize_fp8(held, scaled).items():
        for part, rows in native_names.split_native_tensor(name, len(tensor), 64):
            assert torch.equal(found[part], tensor[rows]), part


def test_quantising_streams_from_any_of_them(
    checkpoint: Path, state: StateDict, told: dict[str, str], options: ModelOptions, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same numbers, from a folder and from fused rows in one file, few rows at a time: the same
    codes.
    """
    monkeypatch.setattr(convert, "WEIGHTS_PER_CHUNK", 64 * 10)
    cast = {name: tensor.bfloat16() for name, tensor in state.items()}
    folder = Path(shutil.copytree(checkpoint, tmp_path / "folder"))
    save_file(cast, folder / "transformer" / single_files.WEIGHTS_FILE)
    scaled = single_files.to_fp8(single_files.native_state(cast), scaled="rows")
    folder2 = Path(shutil.copytree(checkpoint, tmp_path / "folder2"))
    rows = single_files.dequantize_fp8(scaled, "rows")
    restored = {
        part: tensor[kept].contiguous()
        for name, tensor in rows.items()
        for part, kept in native_names.split_native_tensor(name, len(tensor), 64)
    }
    save_file(restored, folder2 / "transformer" / single_files.WEIGHTS_FILE)
    file = single_files.write_safetensors(
        tmp_path / "native.safetensors", single_files.native_state(cast), told
    )
    fp8 = single_files.write_safetensors(tmp_path / "fp8.safetensors", scaled, told)
    cache = {"base_model_precision": "int8", "quantized_cache_dir": str(tmp_path / "cache")}
    made = []
    for place in (folder / "transformer", file, folder2 / "transformer", fp8):
        chosen = options.model_copy(
            update={"pretrained_transformer_model_name_or_path": str(place), **cache}
        )
        (one,) = ChromaFamily().write_quantized_files(
            ChromaFamily().locate_files(chosen), chosen, CPU
        )
        made.append((one, load_file(one)))
    assert len({one for one, _ in made}) == 4  # named by content
    for first, second in ((made[0][1], made[1][1]), (made[2][1], made[3][1])):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def q8_0(tensor: torch.Tensor) -> tuple[int, bytes]:
    """GGML's Q8_0, written from its description: 32 codes to a float16 scale; vectors stay float32."""
    if tensor.dim() < 2 or tensor.shape[1] % 32:
        return 0, single_files.raw_bytes(tensor.float())
    blocks = tensor.float().reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (
        torch.where(scale > 0, blocks / scale.float(), 0.0).round().clamp(-127, 127).to(torch.int8)
    )
    return 8, torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], 1).numpy().tobytes()


def q8_0_back(tensor: torch.Tensor) -> torch.Tensor:
    kind, content = q8_0(tensor)
    if kind == 0:
        return tensor.float()
    blocks = np.frombuffer(content, np.uint8).reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return (
        torch.from_numpy(blocks[:, 2:].copy().view(np.int8) * scale).view(tensor.shape).bfloat16()
    )


def gguf_state(checkpoint: Path, tmp_path: Path) -> StateDict:
    """A transformer whose rotary axes are those of every Chroma: GGUF files do not tell them."""
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    folder = Path(shutil.copytree(checkpoint / "transformer", tmp_path / "axes"))
    (folder / "config.json").write_text(json.dumps(config | {"axes_dims_rope": [4, 14, 14]}))
    return load_file(folder / single_files.WEIGHTS_FILE)


def test_gguf_is_read_row_by_row(checkpoint: Path, tmp_path: Path, options: ModelOptions) -> None:
    pytest.importorskip("gguf")
    state = gguf_state(checkpoint, tmp_path)
    file = single_files.write_gguf(
        tmp_path / "chroma-Q8_0.gguf", single_files.native_state(state), q8_0
    )
    found = weights.load_transformer(file, CPU, torch.bfloat16)
    assert same(found, {name: q8_0_back(tensor).bfloat16() for name, tensor in state.items()})
    chosen = options.model_copy(
        update={
            "pretrained_transformer_model_name_or_path": str(file),
            "base_model_precision": "nf4",
            "quantized_cache_dir": str(tmp_path),
        }
    )
    assert (
        ChromaFamily()
        .write_quantized_files(ChromaFamily().locate_files(chosen), chosen, CPU)[0]
        .exists()
    )


def test_gguf_without_blocks_needs_no_package(checkpoint: Path, tmp_path: Path) -> None:
    state = gguf_state(checkpoint, tmp_path)
    file = single_files.write_gguf(
        tmp_path / "c.gguf",
        single_files.native_state(state),
        lambda one: (30, single_files.raw_bytes(one.bfloat16())),
    )
    found = weights.load_transformer(file, CPU, torch.bfloat16)
    assert same(found, {name: tensor.bfloat16() for name, tensor in state.items()})


def test_gguf_without_its_package_says_what_to_install(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    state = single_files.native_state(single_files.diffusers_state(checkpoint))
    file = single_files.write_gguf(tmp_path / "c.gguf", state, q8_0)
    with pytest.raises(MissingExtra, match=r"pip install 'simpletuner\[gguf\]'"):
        weights.load_transformer(file, CPU, torch.bfloat16)


def llama_t5(state: StateDict) -> StateDict:
    """llama.cpp's names, as its converter gives them to a T5 v1.1 encoder; the alias is left out."""
    ends = {
        "0.SelfAttention.relative_attention_bias": "attn_rel_b", "0.layer_norm": "attn_norm",
        "1.DenseReluDense.wi_0": "ffn_gate", "1.DenseReluDense.wi_1": "ffn_up",
        "1.DenseReluDense.wo": "ffn_down", "1.layer_norm": "ffn_norm",
        **{f"0.SelfAttention.{letter}": f"attn_{letter}" for letter in "qkvo"},
    }  # fmt: skip
    found = {"token_embd.weight": state["shared.weight"]}
    for name, tensor in state.items():
        if name == "encoder.final_layer_norm.weight":
            found["enc.output_norm.weight"] = tensor
        elif name.startswith("encoder.block."):
            number, _, rest = name.removeprefix("encoder.block.").partition(".layer.")
            found[f"enc.blk.{number}.{ends[rest.removesuffix('.weight')]}.weight"] = tensor
    return found


@pytest.mark.parametrize("kind", ["fp32", "fp8", "fp8_scaled", "gguf"])
def test_a_t5_in_one_file_gives_the_folders_rows(
    checkpoint: Path, options: ModelOptions, tmp_path: Path, kind: str
) -> None:
    whole = load_file(checkpoint / "text_encoder" / "model.safetensors")
    whole.setdefault("shared.weight", whole.get("encoder.embed_tokens.weight"))
    held = meant = whole
    if kind.startswith("fp8"):
        held = single_files.to_fp8(whole, scaled=kind == "fp8_scaled")
        meant = single_files.dequantize_fp8(held, kind == "fp8_scaled")
    if kind == "gguf":
        pytest.importorskip("gguf")
        meant = {name: q8_0_back(tensor) for name, tensor in whole.items()}
    folder = Path(shutil.copytree(checkpoint, tmp_path / "folder"))
    save_file({name: tensor.contiguous() for name, tensor in meant.items()},
              folder / "text_encoder" / "model.safetensors", {"format": "pt"})  # fmt: skip
    extra = {"spiece_model": torch.zeros(9, dtype=torch.uint8), "decoder.block.0.x": torch.zeros(2)}
    file = single_files.write_safetensors(tmp_path / "t5xxl.safetensors", {**held, **extra})
    if kind == "gguf":
        file = single_files.write_gguf(tmp_path / "t5xxl-Q8_0.gguf", llama_t5(whole), q8_0)
    said: list[object] = []
    rows = []
    for place in (folder / "text_encoder", file):
        chosen = options.model_copy(update={"pretrained_t5_model_name_or_path": str(place)})
        source = model_files.locate_files(chosen, said.append)
        rows.append(ChromaFamily().load_text_encoder(source, chosen, CPU).encode(CAPTIONS))
        ChromaFamily().read_constants(source)
    assert [str(event) for event in said if "tokenizer" in str(event)]
    assert source.tokenizer == checkpoint / "tokenizer"
    for ours, theirs in zip(*rows, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def native_vae(state: StateDict) -> StateDict:
    """diffusers' names to the author's, the way back that diffusers does not have."""
    found = {}
    for name, tensor in state.items():
        for theirs, ours in (
            ("mid_block.attentions.0.to_q", "mid.attn_1.q"), ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
            ("mid_block.attentions.0.to_v", "mid.attn_1.v"), ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"), ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"), (".downsamplers.0.", ".downsample."), (".resnets.", ".block."),
            (".upsamplers.0.", ".upsample."), ("down_blocks.", "down."),
            *((f"up_blocks.{level}.", f"up.{3 - level}.") for level in range(4)),
        ):  # fmt: skip
            name = name.replace(theirs, ours)
        square = "attn_1" in name and tensor.dim() == 2
        found[name] = tensor[:, :, None, None] if square else tensor
    return found


@pytest.mark.parametrize("names", ["native", "diffusers"])
def test_a_vae_in_one_file_draws_the_same(
    checkpoint: Path, options: ModelOptions, tmp_path: Path, names: str
) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    state = vae.state_dict()
    file = single_files.write_safetensors(
        tmp_path / "ae.safetensors", native_vae(state) if names == "native" else state
    )
    moments = []
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    for place in (tmp_path / "vae", file):
        chosen = options.model_copy(update={"pretrained_vae_model_name_or_path": str(place)})
        source = model_files.locate_files(chosen)
        moments.append(ChromaFamily().load_vae(source, chosen, CPU).encode(pixels))
        assert ChromaFamily().read_constants(source).latent_shift == 0.1159
    assert torch.equal(*moments)


def test_a_main_model_in_one_file_takes_the_rest_from_its_flavour(
    state: StateDict, told: dict[str, str], tmp_path: Path
) -> None:
    file = single_files.write_safetensors(
        tmp_path / "c.safetensors", single_files.native_state(state), told
    )
    chosen = ModelOptions(pretrained_model_name_or_path=str(file), model_flavour="nano")
    source = model_files.locate_files(chosen)
    assert source.transformer == file
    assert {source.vae.parent.name, source.tokenizer.parent.name} == {"nano"}
    with pytest.raises(
        ModelError, match=r"text encoder has width 256, but the transformer expects 48"
    ):
        ChromaFamily().build_spec(chosen, torch.bfloat16)


def test_an_all_in_one_file_brings_all_but_the_tokenizer(
    checkpoint: Path, state: StateDict, told: dict[str, str], tmp_path: Path
) -> None:
    t5 = load_file(checkpoint / "text_encoder" / "model.safetensors")
    vae = load_file(checkpoint / "vae" / single_files.WEIGHTS_FILE)
    file = single_files.write_safetensors(tmp_path / "all.safetensors", {
        **{f"model.diffusion_model.{name}": one for name, one in single_files.native_state(state).items()},
        **{f"text_encoders.t5xxl.transformer.{name}": one.clone() for name, one in t5.items()},
        **{f"vae.{name}": one for name, one in vae.items()},
    }, told)  # fmt: skip
    source = model_files.locate_files(
        ModelOptions(pretrained_model_name_or_path=str(file), model_flavour="nano")
    )
    assert source.transformer == source.vae == source.text_encoder == file
    assert source.tokenizer.parent.name == "nano"
    assert same(weights.load_transformer(file, CPU, torch.float32), state)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["double_blocks.0.img_mod.lin.weight", "double_blocks.0.img_attn.qkv.weight"], "a Flux transformer"),
        (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x",
          "model.diffusion_model.label_emb.0.0.weight"], "Stable Diffusion XL"),
        (["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["transformer.single_transformer_blocks.0.proj_out.lora_A.weight"], "a LoRA"),
        (["lora_unet_single_blocks_0_linear1.lora_down.weight"], "a LoRA"),
        (["nerf_blocks.0.x", "distilled_guidance_layer.in_proj.weight"], "Chroma Radiance"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "only Flux.s VAE|a VAE"),
        (["shared.weight"], "T5 encoder"),
        (["enc.blk.0.attn_q.weight"], "T5 encoder"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a CLIP text encoder"),
        (["a.b", "c"], r"an unknown model \(it holds a\.b, c\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("option", ["", "transformer_"])
def test_another_model_is_named(tmp_path: Path, names: list[str], said: str, option: str) -> None:
    file = single_files.write_safetensors(
        tmp_path / "x.safetensors", {name: torch.zeros(2, 2) for name in names}
    )
    with pytest.raises(ModelError, match=said) as caught:
        model_files.locate_files(
            ModelOptions(
                **{f"pretrained_{option}model_name_or_path": str(file), "model_flavour": "nano"}
            )
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("img_in.weight", None, r"img_in\.weight is missing"),
        ("final_layer.linear.bias", None, r"proj_out\.bias \(64,\) is missing"),
        ("stranger", torch.zeros(3), r"stranger \(3,\) is unexpected"),
        ("txt_in.bias", torch.zeros(5), r"context_embedder\.bias is \(5,\), expected \(64,\)"),
        ("single_blocks.0.linear1.weight", torch.zeros(9, 64), "9 rows cannot hold"),
        ("img_in.bias", torch.zeros(64, dtype=torch.int8), "x_embedder.bias is torch.int8"),
        ("img_in.weight", torch.zeros(()), "img_in.weight is missing|dimensions"),
    ],
)
def test_what_is_wrong_with_a_file_is_listed(
    state: StateDict,
    told: dict[str, str],
    tmp_path: Path,
    name: str,
    tensor: torch.Tensor | None,
    said: str,
) -> None:
    held = single_files.native_state(state)
    if tensor is None:
        del held[name]
    else:
        held[name] = tensor
    file = single_files.write_safetensors(tmp_path / "c.safetensors", held, told)
    with pytest.raises(ModelError, match=said):
        weights.load_transformer(file, CPU, torch.float32)


class Canary:
    """Its pickle, once opened, leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".safetensors", ".gguf"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_opened(tmp_path: Path, suffix: str, zipped: bool) -> None:
    file = tmp_path / f"model{suffix}"
    torch.save({"a": Canary(tmp_path / "ran")}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"pickle.*can run code"):
        model_files.locate_files(ModelOptions(pretrained_model_name_or_path=str(file)))
    assert not (tmp_path / "ran").exists()


def test_a_scale_that_is_no_number_is_refused(
    state: StateDict, told: dict[str, str], tmp_path: Path
) -> None:
    held = single_files.to_fp8(single_files.native_state(state), scaled=True)
    for scale, said in (
        (torch.tensor(float("nan")), "not a finite number"),
        (torch.ones(63), "or one per row"),
    ):
        held["img_in.scale_weight"] = scale
        file = single_files.write_safetensors(tmp_path / "c.safetensors", held, told)
        with pytest.raises(ModelError, match=said):
            weights.load_transformer(file, CPU, torch.bfloat16)

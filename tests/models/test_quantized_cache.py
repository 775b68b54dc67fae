"""Quantised transformers and T5s: converted, found again, and equal to what quantising in memory
gives.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError
from simpletuner.events.event_types import Event, StageStarted, WarningIssued
from simpletuner.models.chroma import t5 as t5_module
from simpletuner.models.chroma import weights
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.family import ModelFiles
from simpletuner.models.weights import quantized_cache as precision_module
from simpletuner.quantization.convert import quantize_to_file
from simpletuner.quantization.quantized_linear import QuantizedLinear, quantize_modules
from simpletuner.quantization.schemes import SCHEMES
from simpletuner.quantization.stored_tensor import StoredTensor

CPU = torch.device("cpu")


@pytest.fixture
def options(options: ModelOptions, tmp_path: Path) -> ModelOptions:
    return options.model_copy(update={"quantized_cache_dir": str(tmp_path / "quantized")})


def quantised(options: ModelOptions, **precisions: str) -> ModelOptions:
    return options.model_copy(update=precisions)


def outputs(transformer: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 6, 64, generator=generator)
    text = torch.randn(2, 4, 48, generator=generator)
    with torch.no_grad():
        return transformer(tokens, torch.tensor([0.3, 0.8]), text, (2, 3))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loaded_equals_quantised_in_memory(
    source: ModelFiles, options: ModelOptions, scheme: str
) -> None:
    chosen = quantised(options, base_model_precision=scheme)
    loaded = ChromaFamily().load_transformer(source, CPU, torch.float32, chosen)
    plain = ChromaFamily().load_transformer(source, CPU, torch.float32)
    before = outputs(plain)
    names = weights.block_linears(plain)
    quantize_modules(plain, names, scheme)
    assert torch.equal(outputs(loaded), outputs(plain))
    assert not torch.equal(outputs(loaded), before)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_only_linears_in_blocks(source: ModelFiles, options: ModelOptions) -> None:
    loaded = ChromaFamily().load_transformer(
        source, CPU, torch.bfloat16, quantised(options, base_model_precision="nf4")
    )
    plain = ChromaFamily().load_transformer(source, CPU, torch.bfloat16)
    inside, outside = set(), set()
    for name, module in loaded.named_modules():
        if isinstance(module, nn.Linear):
            (inside if isinstance(module, QuantizedLinear) else outside).add(name)
    assert len(inside) == 2 * (8 + 4) + 3 * 5
    assert {name.split(".")[0] for name in outside} == {
        "distilled_guidance_layer", "context_embedder", "x_embedder", "proj_out",
    }  # fmt: skip
    state, kept = loaded.state_dict(), plain.state_dict()
    for name, tensor in kept.items():
        if name.removesuffix(".weight") not in inside:
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("scheme", ["no_change", *SCHEMES])
def test_the_empty_network_is_the_loaded_one_without_weights(
    source: ModelFiles, options: ModelOptions, scheme: str
) -> None:
    chosen = quantised(options, base_model_precision=scheme)
    loaded = ChromaFamily().load_transformer(source, CPU, torch.bfloat16, chosen)
    config = weights.read_transformer_config(source.transformer)
    empty = weights.empty_transformer(config, scheme, torch.bfloat16)
    described = {name: (one.shape, one.dtype) for name, one in empty.state_dict().items()}
    assert described == {name: (one.shape, one.dtype) for name, one in loaded.state_dict().items()}
    assert all(one.is_meta for one in empty.state_dict().values())
    assert torch.equal(empty.mod_proj, loaded.mod_proj)
    assert empty.mod_proj.dtype == torch.float32


def test_full_size_without_weights() -> None:
    """What a plan starts from, in the sizes that the README states."""
    sizes = {}
    for scheme in ("int4", "nf4"):  # each takes a second or two of CPU
        state = weights.empty_transformer(TransformerConfig(), scheme).state_dict()
        sizes[scheme] = round(sum(one.nbytes for one in state.values()) / 1e9, 2)
    assert sizes == {"int4": 5.43, "nf4": 5.16}


def test_the_second_start_converts_nothing(source: ModelFiles, options: ModelOptions) -> None:
    chosen = quantised(options, base_model_precision="int8", text_encoder_1_precision="int4")
    heard: list[Event] = []
    files = ChromaFamily().write_quantized_files(source, chosen, CPU, heard.append)
    assert [event.stage for event in heard if isinstance(event, StageStarted)] == [
        "quantize to int8", "quantize to int4",
    ]  # fmt: skip
    stamps = [file.stat().st_mtime_ns for file in files]
    heard.clear()
    ChromaFamily().load_transformer(source, CPU, torch.float32, chosen, heard.append)
    ChromaFamily().load_text_encoder(source, chosen, CPU, heard.append)
    assert ChromaFamily().write_quantized_files(source, chosen, CPU, heard.append) == files
    assert heard == []
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert sorted(files[0].parent.iterdir()) == sorted(files)
    assert ChromaFamily().write_quantized_files(source, options, CPU) == []


def test_other_weights_are_converted_on_their_own(
    source: ModelFiles, options: ModelOptions, checkpoint: Path, tmp_path: Path
) -> None:
    chosen = quantised(options, base_model_precision="int8")
    (first,) = ChromaFamily().write_quantized_files(source, chosen, CPU)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere"))
    moved = chosen.model_copy(update={"pretrained_model_name_or_path": str(folder)})
    assert ChromaFamily().write_quantized_files(ChromaFamily().locate_files(moved), moved, CPU) == [
        first
    ]
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    assert ChromaFamily().write_quantized_files(ChromaFamily().locate_files(moved), moved, CPU) != [
        first
    ]


def test_a_damaged_file_is_made_again(source: ModelFiles, options: ModelOptions) -> None:
    chosen = quantised(options, base_model_precision="nf4")
    (file,) = ChromaFamily().write_quantized_files(source, chosen, CPU)
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    heard: list[Event] = []
    ChromaFamily().load_transformer(source, CPU, torch.float32, chosen, heard.append)
    assert any(isinstance(event, WarningIssued) and "damaged" in event.message for event in heard)
    assert file.read_bytes() == content


def test_a_damaged_file_that_another_process_removes(
    source: ModelFiles, options: ModelOptions
) -> None:
    chosen = quantised(options, base_model_precision="nf4")
    (file,) = ChromaFamily().write_quantized_files(source, chosen, CPU)
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    gone = []

    def other(event: Event) -> None:
        if isinstance(event, WarningIssued):
            gone.append(file.unlink())

    ChromaFamily().write_quantized_files(source, chosen, CPU, other)
    assert gone
    assert file.read_bytes() == content


@pytest.mark.parametrize(("via", "expected"), [("accelerator", "cuda"), ("cpu", "cpu")])
def test_a_base_loaded_to_the_host_for_swapping_is_converted_as_quantize_via_says(
    source: ModelFiles,
    options: ModelOptions,
    monkeypatch: pytest.MonkeyPatch,
    via: str,
    expected: str,
) -> None:
    places = []

    def converting(*arguments: object) -> None:
        places.append(arguments[-2])
        quantize_to_file(*arguments[:-2], CPU, arguments[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(precision_module, "quantize_to_file", converting)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = quantised(options, base_model_precision="int8", quantize_via=via)
    loaded = ChromaFamily().load_transformer(
        source, CPU, torch.float32, chosen.model_copy(update={"musubi_blocks_to_swap": 2.0})
    )
    assert places == [torch.device(expected)]
    assert {tensor.device for tensor in loaded.parameters()} == {CPU}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_parts_are_views_of_the_file(source: ModelFiles, options: ModelOptions) -> None:
    """On the CPU nothing is read that is not used."""
    chosen = quantised(options, base_model_precision="int8")
    loaded = ChromaFamily().load_transformer(source, CPU, torch.float32, chosen)
    (file,) = ChromaFamily().write_quantized_files(source, chosen, CPU)
    lines = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(file))
    ]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for module in loaded.modules():
        if isinstance(module, QuantizedLinear):
            assert any(start <= module.codes.data_ptr() < end for start, end in spans)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_t5_quantised(
    source: ModelFiles, options: ModelOptions, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the quantised T5 are those of a plain one holding the restored weights."""
    chosen = quantised(options, text_encoder_1_precision=scheme)
    texts = ["a red square", "", "two words and more"]
    encoder = ChromaFamily().load_text_encoder(source, chosen, CPU)
    found = encoder.encode(texts)
    assert ChromaFamily().text_fingerprint(source, chosen) != ChromaFamily().text_fingerprint(
        source, options
    )

    load = t5_module.load_stored_tensors

    def load_restored(
        network: nn.Module, tensors: Mapping[str, StoredTensor], device: torch.device
    ) -> None:
        load(network, tensors, device)
        for module in network.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight.detach()
                parts = SCHEMES[scheme].quantize(weight)
                restored = SCHEMES[scheme].dequantize(parts, weight.shape[1], weight.dtype)
                module.weight = nn.Parameter(restored)

    unquantised = ChromaFamily().load_text_encoder(source, options, CPU).encode(texts)
    monkeypatch.setattr(t5_module, "load_stored_tensors", load_restored)
    wanted = ChromaFamily().load_text_encoder(source, options, CPU).encode(texts)
    for one, other, before in zip(found, wanted, unquantised, strict=True):
        assert torch.equal(one["rows"], other["rows"])
        assert not torch.equal(one["rows"], before["rows"])


def test_t5_of_a_whole_t5_and_with_one_of_the_two_names_of_its_embedding(
    source: ModelFiles, options: ModelOptions, checkpoint: Path, tmp_path: Path
) -> None:
    """Published T5s carry a decoder, or name the embedding as the encoder does."""
    from safetensors.torch import load_file, save_file

    chosen = quantised(options, text_encoder_1_precision="int8")
    wanted = ChromaFamily().load_text_encoder(source, chosen, CPU).encode(["a red square"])
    folder = Path(shutil.copytree(checkpoint, tmp_path / "whole"))
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    state["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(2, 2)
    save_file(state, file, metadata={"format": "pt"})
    moved = chosen.model_copy(update={"pretrained_model_name_or_path": str(folder)})
    found = (
        ChromaFamily()
        .load_text_encoder(ChromaFamily().locate_files(moved), moved, CPU)
        .encode(["a red square"])
    )
    assert torch.equal(found[0]["rows"], wanted[0]["rows"])


def test_apple_gpus_have_no_float8(source: ModelFiles, options: ModelOptions) -> None:
    chosen = quantised(options, base_model_precision="fp8")
    with pytest.raises(ConfigError, match='Use "int8"'):
        ChromaFamily().load_transformer(source, torch.device("mps"), torch.bfloat16, chosen)

"""Against an nn.Linear that holds the restored weight: every gradient equal to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.adapters.adapted_linear import adapted_modules
from simpletuner.config.schema import AdapterOptions
from simpletuner.quantization.quantized_linear import QuantizedLinear, quantize_modules
from simpletuner.quantization.schemes import SCHEMES
from tests.adapters.chroma_lora import attach_adapter

WIDTH, HIDDEN = 128, 192


class Block(nn.Module):
    """Three linears, one without bias, one whose input is a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.second = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.third = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(torch.tanh(self.first(x)))[:, 1:])


NAMES = ("first", "second", "third")


def pair(scheme: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Block, Block]:
    """(plain linears that hold the restored weights, the quantised ones), both frozen."""
    torch.manual_seed(3)
    quantized = Block().to(dtype)
    plain = copy.deepcopy(quantized)
    quantize_modules(quantized, NAMES, scheme)
    with torch.no_grad():
        for name in NAMES:
            plain.get_submodule(name).weight.copy_(quantized.get_submodule(name).weight)
    return plain.requires_grad_(False), quantized.requires_grad_(False)


def with_ours(block: Block) -> list[nn.Parameter]:
    trainable = attach_adapter(block, AdapterOptions(lora_rank=4), NAMES, seed=1).trainable
    return started([parameter for _, parameter in trainable])


def with_peft(block: Block, **changes: bool) -> list[nn.Parameter]:
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules="|".join(NAMES), **changes)
    inject_adapter_in_model(config, block, "default")
    return started([parameter for parameter in block.parameters() if parameter.requires_grad])


def with_dora(block: Block) -> list[nn.Parameter]:
    trainable = attach_adapter(
        block, AdapterOptions(lora_rank=4, use_dora=True), NAMES, seed=1
    ).trainable
    return started([parameter for _, parameter in trainable])


def started(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """B away from zero, so that A has a gradient too."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.02
            )
    return parameters


def gradients(
    block: Block,
    parameters: list[nn.Parameter],
    dtype: torch.dtype,
    autocast: bool,
    checkpointed: bool,
) -> list[Tensor]:
    """Output, the input's gradient, and every parameter's."""
    x = (
        torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(4))
        .to(dtype)
        .requires_grad_()
    )
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    y.float().square().sum().backward()
    return [y, x.grad, *[parameter.grad for parameter in parameters]]  # type: ignore[list-item]


def identical(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one is not None, number
        assert torch.equal(one, other), number


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)]
)
def test_gradients_bit_for_bit(
    scheme: str, dtype: torch.dtype, autocast: bool, checkpointed: bool
) -> None:
    plain, quantized = pair(scheme, dtype)
    wanted = gradients(plain, [], dtype, autocast, False)
    identical(gradients(quantized, [], dtype, autocast, checkpointed), wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("adapter", [with_peft, with_dora])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_a_peft_adapter(
    scheme: str,
    checkpointed: bool,
    adapter: Callable[[Block], list[nn.Parameter]],
    dtype: torch.dtype,
) -> None:
    plain, quantized = pair(scheme, dtype)
    wanted = gradients(plain, adapter(plain), dtype, False, False)
    identical(gradients(quantized, adapter(quantized), dtype, False, checkpointed), wanted)
    assert len(wanted) > 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_under_our_lora(scheme: str) -> None:
    """Base and delta are one node over plain weights and over quantised ones."""
    plain, quantized = pair(scheme)
    wanted = gradients(plain, with_ours(plain), torch.bfloat16, False, False)
    identical(gradients(quantized, with_ours(quantized), torch.bfloat16, False, False), wanted)
    assert len(wanted) == 2 + 2 * len(NAMES)
    again = pair(scheme)[1]
    identical(gradients(again, with_ours(again), torch.bfloat16, False, True), wanted)


def test_no_tokens_at_all() -> None:
    x = torch.randn(2, 0, 8, requires_grad=True)
    QuantizedLinear.from_linear(nn.Linear(8, 4), "int8")(x).sum().backward()
    assert x.grad is not None


def test_our_lora_against_float64_arithmetic() -> None:
    """In float32 both paths come to the same numbers."""
    plain, quantized = pair("int8", torch.float32)
    wanted = gradients(plain, with_ours(plain), torch.float32, False, False)
    found = gradients(quantized, with_ours(quantized), torch.float32, False, False)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def saved_bytes(block: Block, own: set[int]) -> int:
    """What autograd keeps beside the network's own tensors; each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, 300, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    own.add(x.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    del y
    return sum(kept.values())


def tensors_of(block: Block) -> set[int]:
    return {one.untyped_storage().data_ptr() for one in (*block.parameters(), *block.buffers())}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_kept_but_the_parts(scheme: str) -> None:
    """Without an adapter only tanh's result; with our LoRA no more than the plain base with it."""
    plain, quantized = pair(scheme)
    assert saved_bytes(quantized, tensors_of(quantized)) == 300 * HIDDEN * 2
    with_ours(plain)
    with_ours(quantized)
    assert saved_bytes(quantized, tensors_of(quantized)) <= saved_bytes(plain, tensors_of(plain))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiles_into_one_graph(scheme: str) -> None:
    block = pair(scheme, torch.float32)[1]
    wanted = gradients(block, [], torch.float32, False, False)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    identical(gradients(compiled, [], torch.float32, False, False), wanted)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_by_inductor_restores_the_same_weight(scheme: str) -> None:
    linear = pair(scheme)[1].first
    torch._dynamo.reset()
    compiled = torch.compile(lambda one: one.weight, fullgraph=True)
    assert torch.equal(compiled(linear), linear.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_round_trip(scheme: str) -> None:
    block = pair(scheme)[1]
    with torch.device("meta"):
        empty = Block().bfloat16()
    quantize_modules(empty, NAMES, scheme)
    assert {key: (one.shape, one.dtype) for key, one in empty.state_dict().items()} == {
        key: (one.shape, one.dtype) for key, one in block.state_dict().items()
    }
    empty.load_state_dict(block.state_dict(), assign=True)
    for name in NAMES:
        assert torch.equal(empty.get_submodule(name).weight, block.get_submodule(name).weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_dtype_leaves_the_parts(scheme: str) -> None:
    linear = pair(scheme)[1].first
    parts = list(linear.buffer_shapes())
    before = {key: linear.get_parameter(key).clone() for key in parts}
    linear.to(torch.float32)
    assert linear.weight.dtype == linear.bias.dtype == torch.float32
    assert all(torch.equal(before[key], linear.get_parameter(key)) for key in parts)
    assert linear.half().weight.dtype == torch.float16
    assert all(before[key].dtype == linear.get_parameter(key).dtype for key in parts)
    assert {one.device.type for one in copy.deepcopy(linear).to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_parts_are_frozen_parameters(scheme: str) -> None:
    """FSDP2 shards parameters only. None of them may be trained, saved as an adapter or cast."""
    block = pair(scheme)[1]
    trained = {id(parameter) for parameter in with_ours(block)}
    frozen = [one for one in block.parameters() if id(one) not in trained]
    assert not any(one.requires_grad for one in frozen)
    assert not list(block.buffers())
    codes = block.first.base_layer.codes
    assert isinstance(codes, nn.Parameter)
    assert any(one is codes for one in frozen)


def test_a_dora_starts_as_the_base() -> None:
    """Its magnitudes are the restored rows' norms."""
    block = pair("int4")[1]
    attach_adapter(block, AdapterOptions(lora_rank=4, use_dora=True), NAMES, seed=1)
    for module in adapted_modules(block).values():
        assert isinstance(module.base_layer, QuantizedLinear)
        assert module.magnitude is not None
        norms = module.base_layer.weight.float().square().sum(1).sqrt()
        assert torch.equal(module.magnitude.detach(), norms)
        x = torch.randn(3, module.base_layer.in_features)
        assert torch.equal(module(x), module.base_layer(x))


def test_a_lora_is_attached_without_restoring_a_weight(monkeypatch: pytest.MonkeyPatch):
    """PEFT asks for weights to see their device: at full size ten minutes and ten gigabytes."""
    _, block = pair("nf4")
    linears = [block.get_submodule(name) for name in NAMES]

    def restored(linear: QuantizedLinear) -> Tensor:
        raise AssertionError("restored")

    monkeypatch.setattr(QuantizedLinear, "weight", property(restored))
    attach_adapter(block, AdapterOptions(lora_rank=4), NAMES, seed=1)
    assert [one.base_layer for one in adapted_modules(block).values()] == linears
    assert not any(one.requires_grad for linear in linears for one in linear.parameters())

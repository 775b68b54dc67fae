"""Swapped blocks on a device that is made up: absent weights are NaN, copies arrive only when
waited for, and a room may not be filled while it is read."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from simpletuner.adapters.attachment import set_strength
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ConfigError
from simpletuner.models import block_executor as block_module
from simpletuner.models.block_executor import BlockExecutor
from simpletuner.models.block_swap import DeviceBuffer, TransferEngine
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.lora_targets import preset_targets
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.family import BlockMemoryPolicy
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.tiny_network import perturb
from tests.models.tiny_checkpoint import TEXT_WIDTH, transformer_fields

ROWS, COLUMNS, TEXT = 3, 4, 6
NAN = 0xFF  # eight of these bits in each byte are NaN in every float format
CPU = torch.device("cpu")


class FakeRoom(DeviceBuffer):
    def __init__(self, lane: FakeLane, size: int) -> None:
        self.lane, self.memory = lane, torch.full((size,), NAN, dtype=torch.uint8)
        self.coming: Tensor | None = None
        self.busy = False

    def start_copy(self, parcel: Tensor) -> None:
        assert not self.busy, "filled while it is read"
        self.memory.fill_(NAN)
        self.coming = self.lane.truth[parcel.data_ptr()]
        self.lane.sent.append(self.lane.names[parcel.data_ptr()])

    def wait_for_copy(self) -> None:
        if self.coming is not None:
            self.memory[: len(self.coming)] = self.coming
            self.coming = None
        self.busy = True

    def record_last_use(self) -> None:
        self.busy = False


@dataclass
class FakeLane(TransferEngine):
    """sent: parcels in the order in which they were copied. host: inputs of blocks that wait."""

    truth: dict[int, Tensor] = field(default_factory=dict)
    names: dict[int, int] = field(default_factory=dict)
    rooms: list[FakeRoom] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    host: list[tuple[int, ...]] = field(default_factory=list)

    def pin_memory(self, parcel: Tensor) -> Tensor:
        """What the blocks see of it is NaN."""
        kept = torch.full_like(parcel, NAN)
        self.truth[kept.data_ptr()] = parcel.clone()
        self.names[kept.data_ptr()] = len(self.names)
        return kept

    def allocate_buffer(self, size: int) -> DeviceBuffer:
        self.rooms.append(FakeRoom(self, size))
        return self.rooms[-1]

    def offload_saved_tensors(self) -> AbstractContextManager[object]:
        def out(tensor: Tensor) -> Tensor:
            self.host.append(tuple(tensor.shape))
            return tensor.clone()

        return torch.autograd.graph.saved_tensors_hooks(out, lambda host: host.clone())


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> FakeLane:
    made = FakeLane()
    monkeypatch.setattr(block_module, "create_transfer_engine", lambda device: made)
    return made


def network(
    options: AdapterOptions | None = None, doubles: int = 2, singles: int = 3
) -> ChromaTransformer:
    torch.manual_seed(0)
    fields = transformer_fields(doubles=doubles, singles=singles)
    made = ChromaTransformer(TransformerConfig.from_dict(fields, "fields")).requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    attached = attach_adapter(
        made, options or AdapterOptions(lora_rank=4), preset_targets(made, "all+ffs"), seed=1
    )
    perturb(attached.trainable)
    return made.train()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, ROWS * COLUMNS, 64, generator=generator)
    return tokens, torch.tensor([0.3, 0.8]), torch.randn(2, TEXT, TEXT_WIDTH, generator=generator)


def run(model: ChromaTransformer) -> Tensor:
    tokens, sigma, text = (given.to(model.x_embedder.weight.device) for given in inputs())
    return model(tokens, sigma, text, (ROWS, COLUMNS), (TEXT, 4))


def step(model: ChromaTransformer) -> dict[str, Tensor]:
    """The output and every gradient."""
    torch.manual_seed(9)
    model.zero_grad()
    out = run(model)
    out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"": out.detach(), **grads}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], expected[k]) for k in found
    )


def arrange(
    model: ChromaTransformer, swapped: int, recomputed: int = 5, offload: bool = False
) -> None:
    ChromaFamily().place_blocks(model, BlockMemoryPolicy(recomputed, 1, swapped, offload), CPU)


@pytest.mark.parametrize("swapped", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"lora_init_type": "pissa"}], ids=str
)
def test_gradients_are_bit_equal(lane: FakeLane, swapped: int, options: dict[str, object]) -> None:
    model = network(AdapterOptions(lora_rank=4, **options))
    expected = step(model)
    arrange(model, swapped)
    assert len(expected) > 50
    for _ in range(3):
        assert same(step(model), expected)


def test_at_most_two_blocks_are_there_and_none_is_sent_in_vain(lane: FakeLane) -> None:
    model = network(doubles=3, singles=5)
    arrange(model, swapped=8, recomputed=8)
    step(model)
    assert len(lane.rooms) == 2
    largest = max(len(parcel) for parcel in lane.truth.values())
    assert [len(room.memory) for room in lane.rooms] == [largest] * 2
    assert lane.sent == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        5,
        4,
        3,
        2,
        1,
        0,
    ]  # 6 is still there when its turn comes
    lane.sent.clear()
    step(model)
    assert lane.sent == [2, 3, 4, 5, 6, 7, 5, 4, 3, 2, 1, 0]  # and so are 0 and 1 at the next step


def test_evenly_spread_and_only_among_the_recomputed(lane: FakeLane) -> None:
    assert BlockMemoryPolicy(57, swapped=3).swapped_block_numbers(57) == (9, 28, 47)
    assert BlockMemoryPolicy(20, swapped=2).swapped_block_numbers(57) == (5, 15)
    assert BlockMemoryPolicy(57, 2, 29).swapped_block_numbers(57) == tuple(range(0, 57, 2))
    assert BlockMemoryPolicy(57, swapped=57).swapped_block_numbers(57) == tuple(range(57))
    assert BlockMemoryPolicy(57).swapped_block_numbers(57) == ()
    with pytest.raises(
        ConfigError, match="4 of 5 blocks, but gradient_checkpointing covers only 3"
    ):
        arrange(network(), swapped=4, recomputed=3)


def test_validation_between_steps(lane: FakeLane) -> None:
    model = network()
    expected = step(model)
    with torch.no_grad():
        torch.manual_seed(9)
        drawn = run(model)
        set_strength(model, 0.0)
        base = run(model)
    arrange(model, swapped=4)
    for _ in range(2):
        with torch.no_grad():
            torch.manual_seed(9)
            set_strength(model, 1.0)
            assert torch.equal(run(model), drawn)
            set_strength(model, 0.0)
            assert torch.equal(run(model), base)
        set_strength(model, 1.0)
        assert same(step(model), expected)


class Broken(Exception):
    pass


def raising(after: int) -> Iterator[None]:
    yield from [None] * after
    raise Broken


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_exception(lane: FakeLane, where: str) -> None:
    """A run that goes on, say after running out of memory, finds nothing half done."""
    model = network()
    expected = step(model)
    arrange(model, swapped=5)
    for after in range(5) if where == "forward" else range(5, 10):
        count_down = partial(lambda left, *_: next(left), raising(after))
        hooks = [block.register_forward_pre_hook(count_down) for block in model.blocks]
        with pytest.raises(Broken):
            step(model)
        for hook in hooks:
            hook.remove()
        assert same(step(model), expected)


def test_several_graphs_before_their_backward_passes(lane: FakeLane) -> None:
    model = network()
    expected = step(model)
    arrange(model, swapped=4)
    torch.manual_seed(9)
    model.zero_grad()
    first, second = run(model), run(model)
    second.square().sum().backward()
    model.zero_grad()
    first.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert same({"": first.detach(), **grads}, expected)


def test_blocks_in_front_that_are_not_adapted(lane: FakeLane) -> None:
    """No gradient reaches them, so nothing is fetched for them in the backward pass."""
    torch.manual_seed(0)
    model = ChromaTransformer(
        TransformerConfig.from_dict(transformer_fields(), "fields")
    ).requires_grad_(False)
    attach_adapter(
        model, AdapterOptions(lora_rank=4), ["single_transformer_blocks.2.attn.to_q"], seed=1
    )
    expected = step(model)
    arrange(model, swapped=5)
    assert same(step(model), expected)
    assert lane.sent == [0, 1, 2, 3, 4]


def test_adapters_stay_and_parameters_keep_their_identity(lane: FakeLane) -> None:
    model = network()
    before = dict(model.named_parameters())
    arrange(model, swapped=5)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(torch.isfinite(p).all() for name, p in after.items() if "lora_" in name)
    away = [n for n, p in after.items() if "blocks." in n and not p.requires_grad]
    assert all(torch.isnan(after[name]).all() for name in away)
    step(model)
    with torch.no_grad():
        run(model)
    assert all(torch.isnan(after[name]).all() for name in away)


def test_quantised_parts_are_swapped_too(lane: FakeLane) -> None:
    """A linear that holds no parameter: codes and scales are buffers of other number types."""

    class Coded(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.scale: Tensor
            self.codes: Tensor
            scale = linear.weight.abs().amax(1, keepdim=True) / 127
            self.register_buffer("codes", (linear.weight / scale).round().to(torch.int8))
            self.register_buffer("scale", scale)
            self.bias = linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.codes.float() * self.scale, self.bias)

    model = network()
    for block in model.blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name == "base_layer":
                    setattr(module, name, Coded(child))
    expected = step(model)
    arrange(model, swapped=5)
    assert same(step(model), expected)
    assert any(tensor.dtype == torch.int8 for tensor in model.buffers())


def test_a_second_arrangement_undoes_the_first(
    lane: FakeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    expected = step(model)
    monkeypatch.setattr(
        FakeLane, "pin_memory", lambda self, parcel: parcel
    )  # weights that come back are real
    monkeypatch.setattr(
        FakeRoom, "start_copy", lambda self, parcel: self.memory[: len(parcel)].copy_(parcel)
    )
    arrange(model, swapped=4)
    assert same(step(model), expected)
    arrange(model, swapped=0)
    assert model.run_block == BlockExecutor(frozenset(range(5)))
    assert same(step(model), expected)


def test_an_arrangement_that_is_undone_holds_nothing(
    lane: FakeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither host memory, nor rooms into which a copy is still on its way."""
    model = network()
    kept: list[weakref.ref[Tensor]] = []

    def keep(self: FakeLane, parcel: Tensor) -> Tensor:
        kept.append(weakref.ref(parcel))
        return parcel

    monkeypatch.setattr(FakeLane, "pin_memory", keep)
    monkeypatch.setattr(
        FakeRoom, "start_copy", lambda self, parcel: setattr(self, "coming", parcel)
    )
    arrange(model, swapped=4)
    former = model.run_block
    with torch.no_grad():
        run(model)
    assert all(parcel() is not None for parcel in kept)
    assert any(room.coming is not None for room in lane.rooms)
    arrange(model, swapped=0)
    assert all(room.coming is None for room in lane.rooms)
    assert former.block_swap is not None
    assert all(parcel() is None for parcel in kept)


def test_inputs_of_recomputed_blocks_wait_on_the_host(lane: FakeLane) -> None:
    model = network()
    expected = step(model)
    arrange(model, swapped=3, recomputed=4, offload=True)
    assert same(step(model), expected)
    image, text, both = (2, ROWS * COLUMNS, 64), (2, TEXT, 64), (2, ROWS * COLUMNS + TEXT, 64)
    # No table, no modulation. The checkpoint of torch 2.10 also saves an empty tensor of its own.
    saved = [shape for shape in lane.host if 0 not in shape]
    assert saved == [image, text, image, text, both, both]
    lane.host.clear()
    with torch.no_grad():
        run(model)
    assert lane.host == []


@pytest.mark.parametrize(
    "memory", [BlockMemoryPolicy(5, 1, 2), BlockMemoryPolicy(5, offload_activations=True)]
)
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_refused_where_the_host_computes(memory: BlockMemoryPolicy, device: str) -> None:
    with pytest.raises(ConfigError, match="musubi_blocks_to_swap = 0"):
        ChromaFamily().place_blocks(network(), memory, torch.device(device))


def test_weights_of_foreign_kinds_are_refused(lane: FakeLane) -> None:
    class Strange(nn.Parameter):
        pass

    model = network()
    model.blocks[2].attn.norm_q.weight = Strange(torch.ones(32), requires_grad=False)
    with pytest.raises(ConfigError, match="supports plain weights"):
        arrange(model, swapped=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with memory of its own")
@pytest.mark.parametrize("swapped", [1, 2, 5])
def test_on_a_gpu(swapped: int) -> None:
    device = torch.device("cuda")
    plain, model = network(), network()
    ChromaFamily().place_blocks(plain, BlockMemoryPolicy(5), device)
    ChromaFamily().place_blocks(
        model, BlockMemoryPolicy(5, 1, swapped, offload_activations=True), device
    )
    assert sum(parameter.device.type == "cpu" for parameter in model.parameters()) > 5 * swapped
    for _ in range(3):
        expected, found = step(plain), step(model)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-5, atol=1e-6 * float(tensor.abs().max())
            )
    ChromaFamily().place_blocks(model, BlockMemoryPolicy(), device)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}

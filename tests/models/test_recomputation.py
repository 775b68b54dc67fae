"""What checkpointed blocks compute a second time: everything but their last products, bit for bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.config.schema import AdapterOptions
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.lora_targets import preset_targets
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.chroma.weights import block_linears
from simpletuner.models.family import BlockMemoryPolicy
from simpletuner.quantization.quantized_linear import QuantizedLinear, quantize_modules
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.tiny_network import perturb
from tests.models.tiny_checkpoint import TEXT_WIDTH, transformer_fields

ROWS, COLUMNS, TEXT = 4, 6, 5
DOUBLES, SINGLES = 2, 3
FULL_RANK = "full rank"
aten = torch.ops.aten


def network(targets: str, precision: str, dropout: float = 0.0) -> ChromaTransformer:
    torch.manual_seed(0)
    fields = transformer_fields(doubles=DOUBLES, singles=SINGLES)
    made = ChromaTransformer(TransformerConfig.from_dict(fields, "fields")).requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    if targets == FULL_RANK:
        for _, parameter in ChromaFamily().full_finetune_parameters(made):
            parameter.requires_grad_(True)
        return made.train()
    if precision != "no_change":
        quantize_modules(made, block_linears(made), precision)
    options = AdapterOptions(lora_rank=4, lora_dropout=dropout)
    perturb(attach_adapter(made, options, preset_targets(made, targets), seed=1).trainable)
    return made.train()


class LastProducts(TorchDispatchMode):
    """Counts the products with the weights of the blocks' last linears, by the rows of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shapes = {(4 * width, width), (5 * width, width)}
        self.rows = Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = {aten.mm.default: args[:2], aten.addmm.default: args[1:3]}.get(func)
        # A forward product is with the transposed weight, a gradient's with the weight itself.
        is_forward = operands is not None and not operands[1].is_contiguous()
        if is_forward and tuple(operands[1].shape) in self.shapes:
            self.rows[len(operands[0])] += 1
        return func(*args, **(kwargs or {}))


def step(model: ChromaTransformer, checkpointed: int) -> tuple[dict[str, Tensor], Counter[int]]:
    """Return the output, every gradient, and the last products by their rows."""
    ChromaFamily().place_blocks(model, BlockMemoryPolicy(checkpointed))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, ROWS * COLUMNS, 64, generator=generator)
    text = torch.randn(1, TEXT, TEXT_WIDTH, generator=generator)
    torch.manual_seed(9)
    model.zero_grad()
    counter = LastProducts(model.config.width)
    with counter:
        out = model(tokens, torch.tensor([0.3]), text, (ROWS, COLUMNS))
        out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"": out.detach(), **grads}, counter.rows


@pytest.mark.parametrize(
    ("targets", "precision"),
    [("all", "no_change"), ("all+ffs", "no_change"), ("all", "int8"), ("all+ffs", "nf4"),
     (FULL_RANK, "no_change")],
)  # fmt: skip
def test_the_last_products_are_not_computed_again(targets: str, precision: str) -> None:
    """Of plain, adapted and quantized linears; a plain text's, of 5 rows, is the exception."""
    model = network(targets, precision)
    kept, products = step(model, 0)
    image, both = ROWS * COLUMNS, ROWS * COLUMNS + TEXT
    assert products == {TEXT: DOUBLES, image: DOUBLES + 1, both: SINGLES - 1}
    again, repeated = step(model, DOUBLES + SINGLES)
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    is_plain = (targets, precision) == ("all", "no_change") or targets == FULL_RANK
    extra = {TEXT: DOUBLES} if is_plain else {}
    assert repeated - products == Counter(extra)
    assert products - repeated == Counter()


def test_dropped_elements_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("all+ffs", "int8", dropout=0.3)
    kept, again = step(model, 0)[0], step(model, DOUBLES + SINGLES)[0]
    assert all(torch.equal(again[name], kept[name]) for name in kept)


@pytest.mark.parametrize(("dropout", "saved"), [(0.3, DOUBLES + SINGLES), (0.0, 0)])
def test_random_states_are_saved_for_dropout_alone(
    dropout: float, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = list[Tensor]()
    get_state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: states.append(get_state()) or get_state())
    model = network("all", "no_change", dropout=dropout)
    ChromaFamily().place_blocks(model, BlockMemoryPolicy(DOUBLES + SINGLES))
    tokens, text = torch.randn(1, ROWS * COLUMNS, 64), torch.randn(1, TEXT, TEXT_WIDTH)
    model(tokens, torch.tensor([0.3]), text, (ROWS, COLUMNS))
    assert len(states) == saved


def test_linears_compute_their_outputs_afterwards() -> None:
    model = network("all+ffs", "nf4")
    first = step(model, DOUBLES + SINGLES)[0]
    marks = [vars(part).get("output_unused", False) for part in model.modules()]
    assert marks.count(True) == 0
    assert any(isinstance(part, QuantizedLinear) for part in model.modules())
    assert torch.equal(step(model, DOUBLES + SINGLES)[0][""], first[""])

"""Blocks under torch.compile: the same numbers, and one set of programs for every size and caption
length.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from simpletuner.config.schema import AdapterOptions, ModelOptions
from simpletuner.models.chroma.embeddings import apply_rotary, multiply_complex_pairs, rotary_table
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

# rows, columns, text rows. No size of the first is a constant of the network's: sizes that are
# equal at first are taken for one and the same, which costs one more program later.
SHAPES = [(3, 7, 13), (4, 6, 12), (6, 4, 5), (8, 8, 21), (5, 5, 10)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network(recomputed: int = 3, precision: str = "no_change") -> ChromaTransformer:
    torch.manual_seed(0)
    fields = transformer_fields(doubles=1, singles=2)
    made = ChromaTransformer(TransformerConfig.from_dict(fields, "fields")).requires_grad_(False)
    if precision != "no_change":
        quantize_modules(made, block_linears(made), precision)
    attached = attach_adapter(
        made, AdapterOptions(lora_rank=4), preset_targets(made, "all+ffs"), seed=1
    )
    perturb(attached.trainable)
    ChromaFamily().place_blocks(made, BlockMemoryPolicy(recomputed))
    return made.train()


def run(
    model: ChromaTransformer, shape: tuple[int, int, int], lengths: tuple[int, ...] | None
) -> Tensor:
    rows, columns, text = shape
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, rows * columns, 64, generator=generator)
    given = torch.randn(2, text, TEXT_WIDTH, generator=generator)
    return model(tokens, torch.tensor([0.3, 0.8]), given, (rows, columns), lengths)


def step(
    model: ChromaTransformer, shape: tuple[int, int, int], lengths: tuple[int, ...] | None
) -> Tensor:
    """Output and gradients in one row."""
    model.zero_grad()
    out = run(model, shape, lengths)
    out.square().sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([out.detach().flatten(), *grads])


def compiled(backend: str, recomputed: int = 3, precision: str = "no_change") -> ChromaTransformer:
    model = network(recomputed, precision)
    ChromaFamily().compile_blocks(model, ModelOptions(dynamo_backend=backend))
    return model


def programs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("recomputed", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_five_shapes_and_no_program_more(recomputed: int) -> None:
    plain, model = network(recomputed), compiled("eager", recomputed)
    found = []
    for shape in SHAPES:
        expected, got = step(plain, shape, None), step(model, shape, None)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
        found.append(programs())
    assert (
        found[0] == 3
    )  # the double block, the single one, and the last, which makes the image's rows only
    assert found == [found[0]] * len(SHAPES)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_unequal_captions_are_one_program_too() -> None:
    plain, model = network(), compiled("eager")
    found = []
    for rows, columns, text in SHAPES:
        for short in (text - 1, text - 3, 2):
            expected = step(plain, (rows, columns, text), (text, short))
            got = step(model, (rows, columns, text), (text, short))
            assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
            found.append(programs())
    assert found == [found[0]] * len(found)


@pytest.mark.slow
def test_drawing_adds_its_programs_once() -> None:
    model = compiled("eager")
    step(model, SHAPES[0], None)
    found = []
    for shape in SHAPES:
        with torch.no_grad():
            run(model.eval(), shape, None)
        step(model.train(), shape, None)
        found.append(programs())
    assert found == [found[0]] * len(found)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("precision", ["no_change", "nf4"])
def test_the_compilers_own_autograd(backend: str, precision: str) -> None:
    """inductor: half a CPU minute, and a C++ compiler."""
    plain, model = network(3, precision), compiled(backend, 3, precision)
    for shape in SHAPES:
        expected, got = step(plain, shape, None), step(model, shape, None)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
        assert programs() == 3


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_drawing_on_a_quantised_base(precision: str) -> None:
    """Without gradients dynamo counts what an autograd node is given, and schemes have two parts or
    three.
    """
    plain, model = network(0, precision).eval(), compiled("eager", 0, precision).eval()
    with torch.no_grad():
        assert torch.equal(run(model, SHAPES[0], None), run(plain, SHAPES[0], None))


def test_names_and_files_do_not_change() -> None:
    assert list(compiled("eager").state_dict()) == list(network().state_dict())


def test_nothing_is_compiled_unless_asked_for() -> None:
    model = network()
    ChromaFamily().compile_blocks(model, ModelOptions())
    step(model, SHAPES[0], None)
    assert programs() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_pairs_of_reals_is_turning_complex_numbers(dtype: torch.dtype) -> None:
    table = rotary_table((8, 12, 12), 5, 6, 7)
    x = torch.randn(2, 47, 3, 32).to(dtype)
    real = multiply_complex_pairs(x.float().unflatten(-1, (-1, 2)), table).flatten(-2).to(dtype)
    limit = torch.finfo(dtype).eps * x.float().abs().max()
    assert (apply_rotary(x, table).float() - real.float()).abs().max() <= limit


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4", "nf4", "fp8"])
def test_compiled_dequantising_changes_no_bit(precision: str) -> None:
    """Of outputs and gradients; the programs of the first step serve every later one."""
    plain, model = network(1, precision), compiled("dequantize", 1, precision)
    assert torch.equal(step(model, SHAPES[0], None), step(plain, SHAPES[0], None))
    first = programs()
    linears = [part for part in plain.modules() if isinstance(part, QuantizedLinear)]
    assert (
        1
        <= first
        <= len({(part.in_features, part.out_features) for part in linears})
        < len(linears)
    )
    for shape in SHAPES[1:]:
        assert torch.equal(step(model, shape, None), step(plain, shape, None))
    assert programs() == first

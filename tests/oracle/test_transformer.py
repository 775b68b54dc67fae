"""Our transformer against diffusers' class, in fp64, with its 512 text rows and a boolean mask.

diffusers rounds to float32 inside RoPE whatever the model's dtype; `exact_rope` lifts only that rounding,
so that fp64 can be compared at 1e-10. One test leaves it in.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from diffusers.models.transformers import transformer_flux
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.transformer import ChromaTransformer, layer_norm_and_modulate
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.family import BlockMemoryPolicy
from tests.models.tiny_checkpoint import TEXT_WIDTH, transformer_fields

ROWS, COLUMNS, TEXT = 6, 5, 512
SIGMA = torch.tensor([0.6543, 0.1237, 0.9])
LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=r".*(to_[qkv]|to_out\.0|add_[qkv]_proj|proj_mlp|net\.2|blocks.*proj_out)",
)


def rope_in_double(x: Tensor, table: tuple[Tensor, Tensor], sequence_dim: int) -> Tensor:
    assert sequence_dim == 1
    cos, sin = (part[None, :, None].double() for part in table)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-imaginary, real), dim=-1).flatten(-2) * sin


@pytest.fixture
def exact_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", rope_in_double)


@pytest.fixture
def pair() -> tuple[ChromaTransformer2DModel, ChromaTransformer]:
    torch.manual_seed(0)
    fields = transformer_fields()
    theirs = ChromaTransformer2DModel(**fields).double()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)  # ones would hide a missing or swapped norm
    ours = ChromaTransformer(TransformerConfig.from_dict(fields, "fields")).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs.requires_grad_(False), ours.requires_grad_(False)


def inputs(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(count, ROWS * COLUMNS, 64, generator=generator, dtype=torch.float64)
    return tokens, torch.randn(count, TEXT, TEXT_WIDTH, generator=generator, dtype=torch.float64)


def run_theirs(model: nn.Module, tokens: Tensor, text: Tensor, lengths: Sequence[int]) -> Tensor:
    ids = torch.zeros(ROWS, COLUMNS, 3)
    ids[..., 1] = torch.arange(ROWS)[:, None]
    ids[..., 2] = torch.arange(COLUMNS)
    mask = torch.ones(len(tokens), TEXT + ROWS * COLUMNS, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        row[length:TEXT] = False
    sigma = SIGMA[: len(tokens)].double()
    return model(
        tokens, text, sigma, ids.reshape(-1, 3), torch.zeros(TEXT, 3), mask, return_dict=False
    )[0]


def run_ours(model: nn.Module, tokens: Tensor, text: Tensor, lengths: Sequence[int]) -> Tensor:
    return model(tokens, SIGMA[: len(tokens)], text[:, : max(lengths)], (ROWS, COLUMNS), lengths)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_state_dicts_load_strictly_both_ways(pair) -> None:
    theirs, ours = pair
    assert list(ours.state_dict()) != []
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.usefixtures("exact_rope")
@pytest.mark.parametrize("lengths", [(20,), (2,), (512,), (13, 13), (7, 20, 512), (3, 9, 21)])
def test_trimmed_text_equals_512_masked_rows(pair, lengths: tuple[int, ...]) -> None:
    theirs, ours = pair
    tokens, text = inputs(len(lengths))
    assert (
        distance(run_ours(ours, tokens, text, lengths), run_theirs(theirs, tokens, text, lengths))
        < 1e-10
    )


def test_as_diffusers_stands_the_rope_rounding_is_all_that_differs(pair) -> None:
    theirs, ours = pair
    tokens, text = inputs(2)
    assert (
        distance(run_ours(ours, tokens, text, (9, 9)), run_theirs(theirs, tokens, text, (9, 9)))
        < 1e-6
    )


def test_every_sample_of_an_unequal_batch_equals_itself_alone(pair) -> None:
    _, ours = pair
    tokens, text = inputs(3)
    lengths = (5, 30, 17)
    together = run_ours(ours, tokens, text, lengths)
    for number, length in enumerate(lengths):
        one = slice(number, number + 1)
        alone = ours(tokens[one], SIGMA[one], text[one, :length], (ROWS, COLUMNS))
        assert distance(together[one], alone) < 1e-10


@pytest.mark.parametrize("lengths", [(5, 30, 17), (20, 20, 3)])
def test_attending_alone_is_attending_behind_a_mask(pair, lengths: tuple[int, ...]) -> None:
    _, ours = pair
    with_lora(ours)
    plain, expected = gradients(ours, run_ours, lengths)
    ours.masked = True
    masked, found = gradients(ours, run_ours, lengths)
    assert distance(masked, plain) < 1e-10
    assert all(distance(found[name], gradient) < 1e-10 for name, gradient in expected.items())


@pytest.mark.parametrize("masked", [False, True])
def test_padded_rows_may_hold_anything(pair, masked: bool) -> None:
    _, ours = pair
    ours.masked = masked
    tokens, text = inputs(2)
    other = text.clone()
    other[0, 5:] = 1e3
    assert (
        distance(run_ours(ours, tokens, other, (5, 30)), run_ours(ours, tokens, text, (5, 30)))
        < 1e-10
    )


def with_lora(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapters with the same random A and B for the same module, B not zero."""
    inject_adapter_in_model(LORA, model)
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for name, parameter in adapters.items():
        generator = torch.Generator().manual_seed(len(name) + parameter.numel())
        parameter.data = 0.1 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        )
    return adapters


def gradients(model: nn.Module, run, lengths: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    tokens, text = inputs(len(lengths))
    output = run(model, tokens, text, lengths)
    model.zero_grad()
    output.square().mean().backward()
    return output.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.usefixtures("exact_rope")
@pytest.mark.parametrize("lengths", [(11,), (11, 11), (4, 19)])
def test_gradients_of_lora_are_diffusers_gradients(pair, lengths: tuple[int, ...]) -> None:
    theirs, ours = pair
    assert with_lora(theirs).keys() == with_lora(ours).keys()
    _, expected = gradients(theirs, run_theirs, lengths)
    _, found = gradients(ours, run_ours, lengths)
    assert len(found) > 50
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert distance(found[name], gradient) < 1e-10, name


def recompute(model: ChromaTransformer, count: int, interval: int = 1) -> None:
    ChromaFamily().place_blocks(model, BlockMemoryPolicy(count, interval))


@pytest.mark.parametrize(("count", "interval"), [(5, 1), (5, 2), (5, 4), (1, 1), (3, 1)])
def test_checkpointing_changes_no_bit(pair, count: int, interval: int) -> None:
    _, ours = pair
    with_lora(ours)
    plain, expected = gradients(ours, run_ours, (4, 19))
    recompute(ours, count, interval)
    recomputed, found = gradients(ours, run_ours, (4, 19))
    assert torch.equal(plain, recomputed)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_checkpointing_drops_the_same_inputs_again(pair) -> None:
    _, ours = pair
    inject_adapter_in_model(LoraConfig(r=4, target_modules=r".*to_[qkv]", lora_dropout=0.5), ours)
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(len(name)))
    ours.train()
    torch.manual_seed(3)
    plain, expected = gradients(ours, run_ours, (9,))
    recompute(ours, 5)
    torch.manual_seed(3)
    recomputed, found = gradients(ours, run_ours, (9,))
    assert torch.equal(plain, recomputed)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("kinds", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_modulation_of_one_sample_is_that_of_a_batch(
    kinds: tuple[torch.dtype, torch.dtype],
) -> None:
    x, (shift, scale) = torch.randn(1, 7, 64).to(kinds[0]), torch.randn(2, 1, 1, 64).to(kinds[1])
    alone, twice = (
        layer_norm_and_modulate(x, shift, scale),
        layer_norm_and_modulate(*(part.repeat(2, 1, 1) for part in (x, shift, scale))),
    )
    assert alone.dtype == twice.dtype
    assert distance(alone, twice[:1]) < 1e-12


def test_checkpointing_frees_activations(pair) -> None:
    _, ours = pair
    with_lora(ours)
    tokens, text = inputs(1)

    def saved_bytes() -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run_ours(ours, tokens, text, (9,))
        return sum(kept.values())

    kept = []
    for count in range(6):
        recompute(ours, count)
        kept.append(saved_bytes())
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 6  # every block counts
    assert kept[5] < kept[0] / 3


def test_modulations_carry_no_graph_and_need_no_blocks(pair) -> None:
    _, ours = pair
    ours.requires_grad_(True)
    tokens, text = inputs(2)
    modulations = ours.modulations(SIGMA[:2])
    assert modulations.shape == (2, ours.config.modulation_count, ours.config.width)
    assert not modulations.requires_grad
    given = ours(tokens, SIGMA[:2], text[:, :9], (ROWS, COLUMNS), modulations=modulations)
    assert torch.equal(given, ours(tokens, SIGMA[:2], text[:, :9], (ROWS, COLUMNS)))
    given.sum().backward()
    assert all(parameter.grad is None for parameter in ours.distilled_guidance_layer.parameters())


def test_time_is_not_rounded_to_the_dtype_of_the_weights(pair) -> None:
    """bf16 has no number between 652 and 656: 654.3 and 655.6 would be told to the network as one
    time.
    """
    _, ours = pair
    sigma = torch.tensor([0.6543, 0.6556])
    exact = ours.modulations(sigma)
    half = ours.bfloat16().modulations(sigma).double()
    assert distance(half, exact) < 0.05
    assert not torch.equal(half[0], half[1])


def test_a_model_built_on_meta_has_its_index_code() -> None:
    fields = TransformerConfig.from_dict(transformer_fields(), "fields")
    with torch.device("meta"):
        on_meta = ChromaTransformer(fields)
    assert on_meta.mod_proj.device.type == "cpu"
    assert torch.equal(on_meta.mod_proj, ChromaTransformer(fields).mod_proj)
    assert "mod_proj" not in on_meta.state_dict()

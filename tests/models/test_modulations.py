"""Modulation vectors computed ahead: the same bits, and no approximator on the device meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simpletuner.models.chroma import modulations
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.family import BlockMemoryPolicy
from tests.models.tiny_checkpoint import TEXT_WIDTH, transformer_fields

CPU = torch.device("cpu")
SIGMAS = torch.tensor([0.1, 0.6543, 0.9, 0.3])
AWAY = BlockMemoryPolicy(approximator_on_host=True)


@pytest.fixture
def network() -> ChromaTransformer:
    torch.manual_seed(0)
    config = TransformerConfig.from_dict(transformer_fields(), "fields")
    return ChromaTransformer(config).bfloat16().requires_grad_(False)


def run(network: ChromaTransformer, sigma: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(len(sigma), 12, 64, generator=generator).bfloat16()
    text = torch.randn(len(sigma), 5, TEXT_WIDTH, generator=generator).bfloat16()
    return network(tokens, sigma, text, (3, 4))


def test_a_sigma_alone_equals_the_same_sigma_in_any_batch(network: ChromaTransformer) -> None:
    together = network.modulations(SIGMAS)
    for row, sigma in zip(together, SIGMAS, strict=True):
        assert torch.equal(network.modulations(sigma[None])[0], row)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.modulations(SIGMAS), together)


def test_ahead_or_in_the_pass_gives_the_same_bits(network: ChromaTransformer) -> None:
    """Whatever was prepared before: nothing, a chunk of other steps, or half of the sigmas."""
    expected = run(network, SIGMAS)
    for prepared in (torch.tensor([]), torch.rand(7), SIGMAS[:2], SIGMAS):
        ChromaFamily().place_blocks(network, AWAY, CPU)
        ChromaFamily().prepare_sigmas(network, prepared)
        assert torch.equal(run(network, SIGMAS), expected)
    ChromaFamily().place_blocks(network, BlockMemoryPolicy(), CPU)
    assert network.prepared_modulations is None
    assert torch.equal(run(network, SIGMAS), expected)


def test_prepared_sigmas_run_no_approximator(network: ChromaTransformer) -> None:
    calls: list[int] = []
    network.distilled_guidance_layer.register_forward_hook(lambda *_: calls.append(1))
    ChromaFamily().place_blocks(network, AWAY, CPU)
    ChromaFamily().prepare_sigmas(network, torch.cat([SIGMAS, SIGMAS]))
    assert len(calls) == len(SIGMAS)
    run(network, SIGMAS)
    run(network, SIGMAS.flip(0))
    assert len(calls) == len(SIGMAS)


@pytest.mark.parametrize("on_device", [True, False])
def test_the_weights_leave_the_device_after_use(
    network: ChromaTransformer, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where computing fails. A copy stands for the weights on the device."""
    monkeypatch.setattr(modulations, "copy_to", lambda tensor, device: tensor.clone())
    approximator = network.distilled_guidance_layer
    host = [parameter.data_ptr() for parameter in approximator.parameters()]
    seen: list[bool] = []

    def compute(sigma: Tensor) -> Tensor:
        now = [parameter.data_ptr() for parameter in approximator.parameters()]
        seen.append(not any(a == b for a, b in zip(now, host, strict=True)))
        if len(seen) == 2:
            raise MemoryError
        return torch.zeros(len(sigma), 3, 2)

    ahead = modulations.PreparedModulations(approximator, compute, CPU, on_device)
    ahead.prepare(SIGMAS[:1])
    with pytest.raises(MemoryError):
        ahead.prepare(SIGMAS[1:2])
    assert seen == [on_device, on_device]
    assert [parameter.data_ptr() for parameter in approximator.parameters()] == host


def test_the_oldest_sigmas_are_dropped(
    network: ChromaTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modulations, "MIN_PREPARED_SIGMAS", 3)
    ahead = modulations.PreparedModulations(
        network.distilled_guidance_layer, network.modulations, CPU, True
    )
    ahead.prepare(torch.tensor([0.5, 0.25, 0.75]))
    ahead.prepare(torch.tensor([0.5, 1.0]))
    assert list(ahead._by_sigma) == [0.75, 0.5, 1.0]
    ahead.prepare(torch.linspace(0, 1, 9))
    assert len(ahead._by_sigma) == 9

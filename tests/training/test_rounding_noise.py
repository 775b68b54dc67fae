from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.schema import OptimizerOptions
from simpletuner.training.optimizers import build_optimizer
from simpletuner.training.rounding_noise import (
    CHUNK,
    RoundingNoise,
    chunk_lanes,
    round_stochastically,
)

LANES = chunk_lanes(torch.device("cpu"))
CHUNKS = 256


def noise_of(seed: int = 0, step: int = 1, parameter: int = 0, first: int = 0) -> RoundingNoise:
    return RoundingNoise(LANES, seed, step, parameter, first)


def round_with(exact: Tensor, noise: RoundingNoise) -> Tensor:
    return round_stochastically(exact, noise.bits(0, slice(0, exact.numel())))


def centred(tensor: int, count: int = CHUNKS) -> Tensor:
    """Return the noise of whole chunks, (count, 4096) float64, with mean 0 and variance 1."""
    bits = noise_of(seed=5).bits(tensor, slice(0, count * CHUNK))
    return (bits.double() + 0.5).view(count, CHUNK) * 12**0.5 / 65536


def test_rounding_is_unbiased_and_to_a_neighbour():
    value = torch.tensor([1.0 + 2**-9, -3.3, 1e-20, 123456.7, 0.0, 2**-126 * 1.3])
    many = value.repeat(40_000, 1)
    rounded = round_with(many, noise_of()).double()
    down, up = rounded.amin(0), rounded.amax(0)
    assert ((down <= value) & (value <= up)).all()
    assert ((up - down) <= value.abs().double() * 2**-7).all()
    error = (rounded.mean(0) - value.double()).abs()
    spread = (up - down).clamp(min=1e-300)
    assert (error[spread > 1e-300] / spread[spread > 1e-300] < 4 * 0.5 / 40_000**0.5).all()
    assert (up > down)[:4].all()
    exact = torch.tensor([1.0, -0.5, 3.0, float("inf"), float("-inf")])
    assert torch.equal(round_with(exact, noise_of(seed=1)).float(), exact)


def test_rounding_keeps_what_is_not_a_number() -> None:
    """CUDA writes NaN as 0x7fffffff: any noise in the lower half would carry through to the sign."""
    patterns = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).repeat(100)
    assert round_with(patterns.view(torch.float32), noise_of()).isnan().all()


@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_every_bit_is_balanced(tensor):
    """Half of a million: within 5 standard deviations."""
    bits = noise_of().bits(tensor, slice(0, CHUNKS * CHUNK)).int()
    for bit in range(16):
        mean = float(((bits >> bit) & 1).double().mean())
        assert abs(mean - 0.5) < 5 * 0.5 / len(bits) ** 0.5, bit


@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_noise_is_uniform_and_chunks_and_positions_are_not_correlated(tensor):
    noise = centred(tensor)
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 / count**0.5
    assert float(noise.var()) == pytest.approx(1, abs=0.005)
    counts = torch.histc(noise, 256, min=-(3**0.5), max=3**0.5)
    chi_square = float(((counts - count / 256) ** 2 / (count / 256)).sum())
    assert 255 - 5 * 510**0.5 < chi_square < 255 + 5 * 510**0.5
    for vectors in (noise, noise.mT[:1024]):
        length = vectors.shape[1]
        correlation = (vectors @ vectors.mT / length).fill_diagonal_(0) * length**0.5
        pairs = correlation.numel() - len(correlation)
        # Of independent vectors the mean square is 1, up to sqrt(2 / pairs).
        assert float(correlation.square().sum() / pairs) == pytest.approx(1, abs=0.05)
        assert float(correlation.abs().max()) < 7


def test_tensors_seeds_steps_and_parameters_are_not_correlated():
    part = slice(0, CHUNKS * CHUNK)
    drawn = [noise_of().bits(tensor, part) for tensor in range(4)]
    drawn += [noise_of(**{key: 9}).bits(0, part) for key in ("seed", "step", "parameter")]
    for a, b in itertools.combinations(drawn, 2):
        product = (a.double() + 0.5) * (b.double() + 0.5) * 12 / 65536**2
        assert abs(float(product.mean())) < 5 / len(a) ** 0.5


def test_uniform_numbers_are_uniform():
    drawn = noise_of().uniform(1, slice(0, CHUNKS * CHUNK)).double()
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=5 / (12 * len(drawn)) ** 0.5)
    assert float(drawn.var()) == pytest.approx(1 / 12, rel=0.01)


@pytest.mark.parametrize(("first", "stop"), [(0, 5000), (4096, 8192), (4095, 4097), (300, 12_345)])
def test_a_shard_draws_the_bits_of_the_whole(first, stop):
    whole, shard = noise_of(), noise_of(first=first)
    for tensor in range(3):
        expected = whole.bits(tensor, slice(0, 3 * CHUNK + 100))[first:stop]
        assert torch.equal(shard.bits(tensor, slice(0, stop - first)), expected)
    expected = whole.uniform(2, slice(0, 3 * CHUNK + 100))[first:stop]
    assert torch.equal(shard.uniform(2, slice(0, stop - first)), expected)


def test_bits_never_change():
    """Checkpoints of one version resume in the next one with the same rounding."""
    bits = noise_of(seed=1, step=2, parameter=3, first=4096).bits(0, slice(0, 4))
    assert bits.tolist() == [24141, -23477, -15961, -5577]


def stepped(seed: int, index: int, optimizer: str, shards: int = 1) -> Tensor:
    """Return a bf16 parameter after one step, stepped as so many separate shards."""
    torch.manual_seed(seed * 7)
    start = torch.linspace(-1, 1, 64 * 256).view(64, 256).bfloat16()
    done = []
    rows = 64 // shards
    for number in range(shards):
        own = start[number * rows : (number + 1) * rows].clone()
        params = [("a", nn.Parameter(own.clone())), ("b", nn.Parameter(own.clone()))]
        options = OptimizerOptions(optimizer=optimizer, learning_rate=1e-3)
        built = build_optimizer(options, params, seed)
        param = params[index][1]
        built.first_number[param] = number * rows * 256
        for _ in range(2):
            param.grad = (own.float() * 3 + 1).bfloat16()
            built.step()
        done.append(param.detach())
    return torch.cat(done)


@pytest.mark.parametrize("optimizer", ["adamw_bf16", "adamw_8bit"])
def test_shards_are_stepped_like_the_whole_parameter(optimizer):
    assert torch.equal(stepped(1, 0, optimizer), stepped(1, 0, optimizer, shards=4))


def test_noise_is_addressed_by_seed_step_and_parameter():
    once = stepped(1, 0, "adamw_bf16")
    assert torch.equal(once, stepped(1, 0, "adamw_bf16"))
    assert not torch.equal(once, stepped(2, 0, "adamw_bf16"))
    assert not torch.equal(once, stepped(1, 1, "adamw_bf16"))

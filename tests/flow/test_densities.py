"""Every density against its closed form, its published shares, and itself: same address, same draw."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from simpletuner.config.schema import FlowOptions
from simpletuner.flow.densities import (
    DENSITIES,
    auto_shift,
    quantile_function,
    sample_sigmas,
    shift_sigma,
)

EDGES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SHARES = {
    "parabola": (0.0096, 0.152, 0.339, 0.339, 0.152, 0.0095),
    "logit-normal": (0.0016, 0.134, 0.364, 0.364, 0.135, 0.0016),
    "uniform": (0.05, 0.20, 0.25, 0.25, 0.20, 0.05),
    "quadratic-literal": (0.107, 0.393, 0.0, 0.0, 0.394, 0.107),
    "quadratic": (0.0472, 0.2259, 0.2269, 0.2269, 0.2259, 0.0472),
    "beta": (0.00725, 0.149, 0.34375, 0.34375, 0.149, 0.00725),
}


def options(**fields: object) -> FlowOptions:
    return FlowOptions(**fields)


def grid(count: int = 200_000) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def shares(sigma: Tensor) -> list[float]:
    edges = torch.tensor(EDGES[1:-1], dtype=torch.float64)
    counts = torch.bincount(torch.searchsorted(edges, sigma, right=True), minlength=6)
    return (counts / counts.sum()).tolist()


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_shares_of_each_density_are_pinned(name: str) -> None:
    found = shares(quantile_function(options(chroma_sigma_density=name))(grid()))
    assert found == pytest.approx(SHARES[name], abs=8e-4)


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_no_density_but_the_literal_has_a_hole(name: str) -> None:
    found = quantile_function(options(chroma_sigma_density=name))(grid(1_000_000))
    counts = torch.histc(found.float(), bins=100, min=0, max=1)
    assert (counts.min() == 0) == (name == "quadratic-literal")
    assert bool((found[1:] >= found[:-1]).all())
    assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("sigma", [0.01, 0.2, 0.4999, 0.6, 0.97])
def test_quadratic_has_its_closed_form(scale: float, sigma: float) -> None:
    """P(sigma <= x) = Phi(logit(s) / scale) with s the remap undone."""
    undone = math.sqrt(sigma / 2) if sigma < 0.5 else 1 - math.sqrt((1 - sigma) / 2)
    u = normal_cdf(math.log(undone / (1 - undone)) / scale)
    draw = quantile_function(options(chroma_sigma_density="quadratic", flow_sigmoid_scale=scale))
    assert float(draw(torch.tensor([u], dtype=torch.float64))) == pytest.approx(sigma, abs=1e-9)


def test_parabola_has_the_probabilities_of_its_grid() -> None:
    weights = [2 - 7.7 * (i / 999 - 0.5) ** 2 for i in range(1000)]
    drawn = quantile_function(options(chroma_sigma_density="parabola"))(grid(4_000_000))
    counts = torch.bincount((drawn * 999).round().long(), minlength=1000) / len(drawn)
    expected = torch.tensor(weights) / sum(weights)
    assert float((counts - expected).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("a", "b"), [(2.0, 2.0), (1.0, 1.0), (0.3, 0.7), (5.0, 1.0), (60.0, 100.0), (0.05, 3.0)]
)
def test_beta_has_its_moments(a: float, b: float) -> None:
    draw = quantile_function(
        options(flow_use_beta_schedule=True, flow_beta_schedule_alpha=a, flow_beta_schedule_beta=b)
    )
    sigma = draw(grid())
    assert float(sigma.mean()) == pytest.approx(a / (a + b), abs=2e-4)
    assert float(sigma.var()) == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)), rel=5e-3)


def test_beta_2_2_is_the_cubic() -> None:
    u = quantile_function(options(chroma_sigma_density="beta"))(grid())
    torch.testing.assert_close(3 * u**2 - 2 * u**3, grid(), atol=6e-6, rtol=0)


@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_shift_comes_before_the_remap(shift: float) -> None:
    u = grid(1000)
    base = torch.sigmoid(torch.special.ndtri(u))
    moved = shift * base / (1 + (shift - 1) * base)
    expected = torch.where(moved < 0.5, 2 * moved**2, 1 - 2 * (1 - moved) ** 2)
    torch.testing.assert_close(quantile_function(options(flow_schedule_shift=shift))(u), expected)


def test_shift_is_off_unless_asked_for() -> None:
    torch.testing.assert_close(
        quantile_function(options(flow_use_uniform_schedule=True))(grid(100)), grid(100)
    )
    assert float(shift_sigma(torch.tensor(0.5), 3.0)) == pytest.approx(0.75)


def test_the_automatic_shift_follows_the_image_tokens() -> None:
    assert auto_shift(256) == pytest.approx(math.exp(0.5))
    assert auto_shift(4096) == pytest.approx(math.exp(1.15))
    auto = options(
        flow_schedule_auto_shift=True, flow_use_uniform_schedule=True, stratified_sigmas=False
    )
    small, large = (float(sample_sigmas(auto, 1, 1, 4000, tokens).mean()) for tokens in (256, 4096))
    assert small < large
    with pytest.raises(ValueError, match="image tokens"):
        sample_sigmas(auto, 1, 1, 4)


def test_literal_shift_3_is_what_others_train() -> None:
    literal = options(chroma_sigma_density="quadratic-literal", flow_schedule_shift=3.0)
    assert shares(quantile_function(literal)(grid())) == pytest.approx(
        (0.010, 0.126, 0, 0, 0.422, 0.442), abs=1e-3
    )


@pytest.mark.parametrize(
    ("given", "sigmas"), [("250, 500,750", {0.25, 0.5, 0.75}), ("0.1,1", {0.1, 1.0})]
)
def test_custom_noise_levels_are_taken_as_they_are(given: str, sigmas: set[float]) -> None:
    custom = options(flow_custom_timesteps=given, flow_schedule_shift=3.0)
    drawn = quantile_function(custom)(grid(1200))
    assert {round(value, 9) for value in drawn.tolist()} == sigmas
    assert len(set(torch.unique(drawn, return_counts=True)[1].tolist())) == 1


def test_round_robin_goes_through_the_list_across_steps() -> None:
    custom = options(flow_custom_timesteps="0.1,0.2,0.3", flow_timesteps_mode="round-robin")
    drawn = torch.cat([sample_sigmas(custom, 7, step, 2) for step in range(3)])
    torch.testing.assert_close(drawn, torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.3]))


def test_the_fast_schedule_is_seven_ones_in_ten() -> None:
    drawn = quantile_function(options(flux_fast_schedule=True, flow_schedule_shift=3.0))(grid(1000))
    values, counts = torch.unique(drawn, return_counts=True)
    assert values.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert counts.tolist() == [100, 100, 100, 700]


def test_strata_lower_the_variance_of_a_steps_mean() -> None:
    def spread(stratified: bool) -> float:
        chosen = options(stratified_sigmas=stratified)
        return float(
            torch.stack([sample_sigmas(chosen, 5, step, 8).mean() for step in range(500)]).var()
        )

    assert spread(True) < spread(False) / 10


def test_steps_and_seeds_are_independent() -> None:
    plain = options()
    assert not torch.equal(sample_sigmas(plain, 1, 1, 8), sample_sigmas(plain, 1, 2, 8))
    assert not torch.equal(sample_sigmas(plain, 1, 1, 8), sample_sigmas(plain, 2, 1, 8))


@pytest.mark.parametrize("name", ["logit-normal", "quadratic", "uniform", "parabola", "beta"])
def test_an_offset_moves_the_logit_of_its_samples_before_the_remap(name: str) -> None:
    chosen = options(chroma_sigma_density=name, flow_schedule_shift=2.0)
    u = grid(1000)
    moved = quantile_function(chosen, offsets=[0.7] * 1000)(u)
    shifted = options(chroma_sigma_density=name, flow_schedule_shift=2.0 * math.exp(0.7))
    torch.testing.assert_close(moved, quantile_function(shifted)(u))
    if name == "logit-normal":
        plain = quantile_function(options(chroma_sigma_density=name))(u)
        offset = quantile_function(options(chroma_sigma_density=name), offsets=[0.7] * 1000)(u)
        torch.testing.assert_close(torch.logit(offset), torch.logit(plain) + 0.7)


def test_an_offset_is_of_its_own_samples_and_none_changes_nothing() -> None:
    plain = options()
    assert torch.equal(
        sample_sigmas(plain, 1, 5, 8, offsets=[0.0] * 8), sample_sigmas(plain, 1, 5, 8)
    )
    mixed = sample_sigmas(plain, 1, 5, 8, offsets=[0.0, 1.0] * 4)
    assert torch.equal(mixed[::2], sample_sigmas(plain, 1, 5, 8)[::2])
    assert (mixed[1::2] > sample_sigmas(plain, 1, 5, 8)[1::2]).all()


def test_one_sample_a_step_is_stratified_over_sixteen_steps() -> None:
    """Each block of 16 steps has one sigma in each sixteenth, in an order of its own."""
    chosen = options(flow_use_uniform_schedule=True)
    drawn = torch.cat([sample_sigmas(chosen, 5, step, 1) for step in range(64)]).view(4, 16)
    slices = (drawn * 16).floor()
    assert torch.equal(slices.sort(1).values, torch.arange(16.0).expand(4, 16))
    assert len(torch.unique(slices, dim=0)) == 4
    assert torch.equal(drawn[2, 3], sample_sigmas(chosen, 5, 35, 1)[0])
    independent = options(flow_use_uniform_schedule=True, stratified_sigmas=False)
    drawn = torch.cat([sample_sigmas(independent, 5, step, 1) for step in range(16)])
    assert len(torch.unique((drawn * 16).floor())) < 16

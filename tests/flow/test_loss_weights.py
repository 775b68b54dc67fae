from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.config.load import try_load_mapping
from simpletuner.config.loss_weights import WEIGHT_NAMES
from simpletuner.flow.loss_weights import WEIGHTS, loss_weight

GRID = (torch.arange(200_000, dtype=torch.float32) + 0.5) / 200_000


def test_the_names_of_the_options_are_those_of_the_table() -> None:
    assert tuple(WEIGHTS) == WEIGHT_NAMES


@pytest.mark.parametrize("name", WEIGHT_NAMES)
def test_a_named_weight_has_the_mean_1_over_uniform_sigmas(name: str) -> None:
    weight = loss_weight(name, GRID)
    assert weight.dtype == torch.float32
    assert float(weight.double().mean()) == pytest.approx(1, abs=1e-5)
    assert bool((weight >= 0).all())


def test_min_snr_is_that_of_the_image_error_written_for_the_velocity() -> None:
    sigma = GRID[::1000].double()
    snr = ((1 - sigma) / sigma) ** 2
    of_velocity = sigma**2 * snr.clamp(max=5)
    found = loss_weight("min_snr", sigma).double()
    ratio = found / of_velocity
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4)


def test_cosmap_is_its_density() -> None:
    found = loss_weight("cosmap", torch.tensor([0.0, 0.5, 1.0]))
    assert found.tolist() == pytest.approx([0.63662, 1.27324, 0.63662], abs=1e-4)


def test_points_are_joined_by_lines_and_constant_outside() -> None:
    sigma = torch.tensor([0.0, 0.2, 0.3, 0.4, 0.7, 1.0])
    found = loss_weight("0.2:1, 0.4:3, 0.9:0", sigma)
    assert found.tolist() == pytest.approx([1, 1, 2, 3, 1.2, 0], abs=1e-6)
    assert loss_weight("0.5:2", sigma).tolist() == [2.0] * 6


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("cosmpa", "neither cosmap nor min_snr nor a point"),
        ("0:1,0.5", "'0.5' is neither"),
        ("0:1,2:1", "sigma must be from 0 to 1"),
        ("0:-1", "the weight from 0"),
        ("0:nan", "the weight from 0"),
        ("0.5:1,0.5:2", "larger than the one before"),
        ("0:0,1:0", "nothing would be trained"),
    ],
)
def test_what_is_no_curve_is_refused(text: str, part: str, tmp_path: Path) -> None:
    problems = try_load_mapping({"loss_weight_by_sigma": text}, tmp_path).problems
    assert any(part in str(problem) for problem in problems), problems

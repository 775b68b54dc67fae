"""The weights of a batch's two targets: masks, regularisation, second captions."""

from __future__ import annotations

import pytest
import torch

from simpletuner.cache.target_rules import PreservedCaption, TargetRules

GENERATOR = torch.Generator().manual_seed(4)
MASK = torch.rand(4, 6, generator=GENERATOR)


def test_plain_images_have_no_weights() -> None:
    assert TargetRules().weigh(["a", "a"], [None, None], 1) is None
    assert TargetRules({"reg": "base"}, outside_weight=2.0).weigh(["a"], [None], 1) is None


def test_masks_have_the_mean_1_inside_and_the_weight_outside() -> None:
    weights = TargetRules(outside_weight=0.25).weigh(["a", "a"], [MASK, None], 1)
    assert weights is not None
    assert weights.data.shape == weights.base.shape == (2, 1, 4, 6)
    assert weights.base_rows == (0,)
    torch.testing.assert_close(weights.data[0, 0], MASK / MASK.mean())
    torch.testing.assert_close(weights.base[0, 0], 0.25 * (1 - MASK) / (1 - MASK).mean())
    assert torch.equal(weights.data[1], torch.ones(1, 4, 6))
    assert torch.equal(weights.base[1], torch.zeros(1, 4, 6))


def test_a_white_mask_is_exactly_none_and_a_binary_one_exactly_zero_outside() -> None:
    rules = TargetRules(outside_weight=1.0)
    white = rules.weigh(["a"], [torch.ones(7, 9)], 1)
    assert white is not None
    assert torch.equal(white.data, torch.ones(1, 1, 7, 9))
    assert white.base_rows == ()
    binary = (MASK > 0.5).float()
    weights = TargetRules().weigh(["a"], [binary], 1)
    assert weights is not None
    assert weights.base_rows == ()
    assert torch.equal(weights.data[0, 0] != 0, binary == 1)


@pytest.mark.parametrize("mask", [None, MASK])
def test_regularisation_is_trained_towards_its_target(mask: torch.Tensor | None) -> None:
    rules = TargetRules({"reg": "base", "plain": "images"}, prior_weight=0.5)
    towards_base = rules.weigh(["reg"], [mask], 1)
    towards_images = rules.weigh(["plain"], [mask], 1)
    assert towards_base is not None
    assert towards_images is not None
    assert towards_base.base_rows == (0,)
    assert towards_images.base_rows == ()
    assert not towards_base.data.any()
    assert not towards_images.base.any()
    assert torch.equal(towards_base.base, towards_images.data)
    assert float(towards_base.base.mean()) == pytest.approx(0.5)


def test_copies_are_trained_towards_the_base() -> None:
    rules = TargetRules(preserved=PreservedCaption(""), preservation_weight=3.0)
    weights = rules.weigh(["a", "b"], [None, None], 2)
    assert weights is not None
    assert weights.data.flatten().tolist() == [1, 1, 0, 0]
    assert weights.base.flatten().tolist() == [0, 0, 3, 3]
    assert weights.base_rows == (2, 3)


def test_captions_of_the_class() -> None:
    dog = PreservedCaption("dog", "zorbo")
    assert [dog.of(text) for text in ("a zorbo, zorbo", "a cat", "")] == [
        "a dog, dog",
        "dog",
        "dog",
    ]
    assert PreservedCaption("").of("a zorbo") == ""
    rules = TargetRules({"reg": "base"}, preserved=dog)
    assert rules.captions(["a zorbo"]) == {"a dog", "dog"}
    assert rules.has_copies(["a"])
    assert not rules.has_copies(["reg"])
    assert TargetRules().captions(["a"]) == set()
    assert not TargetRules().has_copies(["a"])


def test_who_needs_the_base() -> None:
    assert not TargetRules({"plain": "images"}).uses_base()
    for rules in (
        TargetRules({"reg": "base"}),
        TargetRules(outside_weight=0.1),
        TargetRules(preserved=PreservedCaption("")),
    ):
        assert rules.uses_base()

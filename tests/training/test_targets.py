"""Masks, the base's prediction and the penalty inside the training step of a small Chroma."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from simpletuner.adapters.adapted_linear import LoraLinear, adapted_modules
from simpletuner.cache.batch_types import Batch, TargetWeights, TextBatch
from simpletuner.cache.target_rules import PreservedCaption, TargetRules
from simpletuner.config.schema import FlowOptions
from simpletuner.flow.objective import loss_per_sample
from simpletuner.training import loop
from simpletuner.training.base_targets import BaseNetwork, weighted_losses
from simpletuner.training.loop import TrainerContext
from simpletuner.training.memory_plan.fake_step import TargetUse
from simpletuner.training.memory_plan.prediction import predict_memory
from tests.training.memory_plan.tiny_family import FAMILY, TinyChroma, make_run_config
from tests.training.test_rollout_training import SIGMA, make_batch, make_context, path

HALF = torch.zeros(8, 8)
HALF[:, :4] = 1
DATASETS = ["photos"] * 4


def with_weights(batch: Batch, rules: TargetRules, masks: list[Tensor | None]) -> Batch:
    return dataclasses.replace(batch, weights=rules.weigh(DATASETS, masks, 1))


def gradients(context: TrainerContext, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    for parameter in context.transformer.parameters():
        parameter.grad = None
    losses = loop.compute_losses(context, batch, SIGMA, 0)
    losses.sum().backward()
    found = {
        name: parameter.grad.clone()
        for name, parameter in context.transformer.named_parameters()
        if parameter.grad is not None
    }
    return losses.detach(), found


@contextmanager
def without_adapter(context: TrainerContext) -> Iterator[None]:
    """Take the adapted linears out of the network, so that it has no adapter at all."""
    adapted = adapted_modules(context.transformer)
    for name, module in adapted.items():
        context.transformer.set_submodule(name, module.base_layer)
    try:
        yield
    finally:
        for name, module in adapted.items():
            context.transformer.set_submodule(name, module)


def base_velocity(context: TrainerContext, batch: Batch, text: TextBatch | None = None) -> Tensor:
    x, _ = path(context, batch, SIGMA)
    with torch.no_grad(), without_adapter(context):
        return FAMILY.predict_velocity(context.transformer, x, SIGMA, text or batch.text)


def velocity(context: TrainerContext, batch: Batch, text: TextBatch | None = None) -> Tensor:
    x, _ = path(context, batch, SIGMA)
    with torch.no_grad():
        return FAMILY.predict_velocity(context.transformer, x, SIGMA, text or batch.text)


@pytest.mark.parametrize("loss_type", ["l2", "huber", "smooth_l1"])
def test_white_masks_train_bit_for_bit_like_none_and_half_black_ones_do_not(loss_type: str) -> None:
    context = make_context(loss_type=loss_type)
    rules = TargetRules(outside_weight=1.0)
    plain = gradients(context, make_batch())
    white = gradients(context, with_weights(make_batch(), rules, [torch.ones(8, 8)] * 4))
    assert torch.equal(white[0], plain[0])
    assert white[1].keys() == plain[1].keys()
    assert all(torch.equal(white[1][name], grad) for name, grad in plain[1].items())
    half = gradients(context, with_weights(make_batch(), TargetRules(), [HALF, None, None, None]))
    assert not torch.equal(half[0][0], plain[0][0])
    assert torch.equal(half[0][1:], plain[0][1:]), "the other samples of the batch are as before"


def test_a_masked_loss_is_the_mean_weighted_by_area() -> None:
    context, batch = make_context(), make_batch()
    levels = torch.rand(8, 8, generator=torch.Generator().manual_seed(2))
    masks: list[Tensor | None] = [levels, HALF, None, None]
    rules = TargetRules(outside_weight=0.5)
    found = loop.compute_losses(context, with_weights(batch, rules, masks), SIGMA, 0)
    _, target = path(context, batch, SIGMA)
    v, base = velocity(context, batch).double(), base_velocity(context, batch).double()
    for row, mask in enumerate(masks):
        m = torch.ones(8, 8).double() if mask is None else mask.double()
        errors, towards_base = (v[row] - target[row]) ** 2, (v[row] - base[row]) ** 2
        expected = (m * errors).sum() / (16 * m.sum())
        if mask is not None:
            expected += 0.5 * ((1 - m) * towards_base).sum() / (16 * (1 - m).sum())
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss_type", ["l2", "huber", "smooth_l1"])
def test_gradients_from_outside_are_exactly_zero_where_the_weight_is(loss_type: str) -> None:
    options = FlowOptions(loss_type=loss_type)
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(2, 16, 8, 8, generator=generator).requires_grad_()
    target = torch.randn(2, 16, 8, 8, generator=generator)
    for outside, is_zero in ((0.0, True), (0.3, False)):
        weights = TargetRules(outside_weight=outside).weigh(["a", "a"], [HALF, None], 1)
        assert weights is not None
        base = target[list(weights.base_rows)] + 1
        losses = weighted_losses(v, target, base, SIGMA[:2], weights, options)
        (grad,) = torch.autograd.grad(losses.sum(), v)
        assert bool((grad[0, :, :, 4:] == 0).all()) == is_zero
        assert bool((grad[0, :, :, :4] != 0).all())
        assert bool((grad[1] != 0).all())


def test_the_target_of_regularisation_is_the_network_without_its_adapter() -> None:
    """Same noise, same sigma, no gradient through it; the adapter is on again afterwards."""
    context, batch = make_context(lora_dropout=0.5), make_batch()
    context.transformer.eval()
    rules = TargetRules({"photos": "base"}, prior_weight=2.0)
    found = loop.compute_losses(context, with_weights(batch, rules, [None] * 4), SIGMA, 0)
    v, base = velocity(context, batch), base_velocity(context, batch)
    assert float((v - base).abs().max()) > 0.01
    torch.testing.assert_close(found, 2 * (v - base).square().flatten(1).mean(1))
    assert {module.strength for module in adapted_modules(context.transformer).values()} == {1.0}


def test_an_adapter_that_changes_nothing_has_no_loss_towards_the_base() -> None:
    context = make_context()
    for module in adapted_modules(context.transformer).values():
        assert isinstance(module, LoraLinear)
        torch.nn.init.zeros_(module.up)
    batch = with_weights(make_batch(), TargetRules({"photos": "base"}), [None] * 4)
    losses, found = gradients(context, batch)
    assert float(losses.max()) < 1e-10
    assert all(float(grad.abs().max()) < 1e-5 for grad in found.values())


def test_the_base_s_pass_draws_no_dropout_and_keeps_nothing() -> None:
    context = make_context(lora_dropout=0.5)
    context.transformer.train()
    plain = make_batch()
    torch.manual_seed(7)
    expected = loop.compute_losses(context, plain, SIGMA, 0)
    torch.manual_seed(7)
    # The base's prediction of row 3 alone, so the other rows are those of the plain step.
    weights = TargetWeights(
        torch.tensor([1.0, 1, 1, 0]).view(4, 1, 1, 1),
        torch.tensor([0.0, 0, 0, 1]).view(4, 1, 1, 1),
        (3,),
    )
    found = loop.compute_losses(context, dataclasses.replace(plain, weights=weights), SIGMA, 0)
    assert torch.equal(found[:3], expected[:3])
    assert context.transformer.training
    base = context.base_network.velocity(plain.latents, SIGMA, plain.text, weights)
    assert base.shape == (1, 16, 8, 8)
    assert not base.requires_grad


def test_a_second_caption_is_trained_towards_the_base_at_the_same_input() -> None:
    context, batch = make_context(), make_batch()
    other = TextBatch(
        {"rows": batch.text.tensors["rows"].flip(0)}, {"rows": batch.text.lengths["rows"][::-1]}
    )
    both = TextBatch(
        {"rows": torch.cat([batch.text.tensors["rows"], other.tensors["rows"]])},
        {"rows": batch.text.lengths["rows"] + other.lengths["rows"]},
    )
    rules = TargetRules(preserved=PreservedCaption("x"), preservation_weight=0.25)
    doubled = Batch(
        batch.latents.repeat(2, 1, 1, 1), both, batch.sample_ids, batch.visit_keys * 2,
        weights=rules.weigh(DATASETS, [None] * 4, 2), copies=2,
    )  # fmt: skip
    found = loop.compute_losses(context, doubled, SIGMA, 0)
    torch.testing.assert_close(found[:4], loop.compute_losses(context, batch, SIGMA, 0))
    v, base = velocity(context, batch, other), base_velocity(context, batch, other)
    torch.testing.assert_close(found[4:], 0.25 * (v - base).square().flatten(1).mean(1))


def test_processes_that_share_the_network_run_the_base_equally_often() -> None:
    calls: list[int] = []
    context = make_context()

    def counted(x: Tensor, sigma: Tensor, text: TextBatch) -> Tensor:
        assert not context.transformer.training, "no dropout, no gradient checkpointing"
        assert not torch.is_grad_enabled()
        calls.append(len(x))
        return context.predict_velocity(x, sigma, text)

    context.transformer.train()
    for every_pass, expected in ((False, []), (True, [1])):
        calls.clear()
        base = BaseNetwork(context.transformer, counted, context.device.autocast, every_pass)
        batch = make_batch()
        assert base.velocity(batch.latents, SIGMA, batch.text, None).shape == (0, 16, 8, 8)
        assert calls == expected


def test_weights_keep_their_gradient_under_autocast() -> None:
    """The casts of the base's pass, which have no gradient, are not those of the training pass."""
    run = {"mixed_precision": "bf16", "base_model_default_dtype": "fp32"}
    context = make_context(**run)
    batch = with_weights(make_batch(), TargetRules({"photos": "base"}), [None] * 4)
    _, found = gradients(context, batch)
    adapted = adapted_modules(context.transformer)
    # The text half of the last double block's output goes nowhere.
    assert len(found) >= 2 * len(adapted) - 8
    assert all(bool(grad.isfinite().all()) for grad in found.values())


def test_the_penalty_counts_once_in_a_step() -> None:
    weight = 0.01
    plain, penalised = make_context(), make_context(delta_weight_penalty=weight)
    batch, reference = make_batch(), {}
    for context in (plain, penalised):
        for number in (0, 1, 2):
            loop.backward_micro_batch(context, batch, SIGMA, 12, number, place=number)
    for name, parameter in plain.transformer.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            reference[name] = parameter.grad
    for name, module in adapted_modules(penalised.transformer).items():
        assert isinstance(module, LoraLinear)
        a, b, s = module.down.double(), module.up.double(), module.scale
        changes = {
            "down": 2 * weight * s * s * b.t() @ b @ a,
            "up": 2 * weight * s * s * b @ a @ a.t(),
        }
        for part, change in changes.items():
            found = getattr(module, part).grad.double() - reference[f"{name}.{part}"].double()
            torch.testing.assert_close(found, change, rtol=1e-3, atol=1e-6)


def predict(**options: object) -> tuple[float, float, int]:
    plan = predict_memory(make_run_config(**options), TinyChroma(), (), "cuda")
    return plan.flops, plan.base_flops, plan.tensor_bytes


def test_the_plan_counts_the_base_s_pass_and_second_captions() -> None:
    flops, none, size = predict()
    assert none == 0
    masked_flops, base_flops, masked_size = predict(masked_prior_preservation_weight=0.5)
    assert masked_flops == flops + base_flops
    # With gradient checkpointing a LoRA's step is forward, forward again, and backward.
    assert 0.2 < base_flops / flops < 0.4
    assert size < masked_size < 1.1 * size


@pytest.mark.slow
def test_the_plan_counts_what_datasets_ask_for_and_the_penalty() -> None:
    flops, _, size = predict()
    assert flops < predict(delta_weight_penalty=0.1)[0] < 1.05 * flops
    run = make_run_config(gradient_accumulation_steps=3)
    plan = predict_memory(run, TinyChroma(), (), "cuda", targets=TargetUse(towards_base=True))
    assert plan.flops == pytest.approx(3 * flops + plan.base_flops)
    assert 0.2 < plan.base_flops / (3 * flops) < 0.4
    masked = predict_memory(
        make_run_config(), TinyChroma(), (), "cuda", targets=TargetUse(masked=True)
    )
    assert masked.flops == flops
    assert size < masked.tensor_bytes < 1.1 * size
    dop = {"diff_output_preservation": True, "diff_output_preservation_class": "dog"}
    assert predict(**dop) == predict(blank_prompt_preservation=True)
    _, base_flops, masked_size = predict(masked_prior_preservation_weight=0.5)
    doubled = predict(blank_prompt_preservation=True)
    assert doubled[0] == pytest.approx(2 * (flops + base_flops), rel=1e-3)
    assert doubled[1] == pytest.approx(2 * base_flops, rel=1e-3)
    assert doubled[2] > masked_size


def test_a_weight_multiplies_the_error_of_every_element() -> None:
    v, target = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    weight = torch.zeros(2, 1, 4, 4)
    weight[0, 0, 0, 0] = 16.0
    losses = loss_per_sample(v, target, SIGMA[:2], FlowOptions(), weight)
    assert losses.tolist() == [1.0, 0.0]

"""Rollouts and MixFlow inside the training step of a small Chroma with real weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.events.sinks import null_emit
from simpletuner.flow.objective import add_noise, sample_noise, velocity_target
from simpletuner.flow.rollout import choose_rollouts, mixflow_sigma
from simpletuner.models.family import BlockMemoryPolicy
from simpletuner.training import loop, train_state
from simpletuner.training.loop import TrainerContext, TrainSchedule
from simpletuner.training.memory_plan.fake_step import (
    BatchShape,
    make_fake_context,
    measure_fake_step,
)
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from simpletuner.training.memory_plan.prediction import predict_memory
from simpletuner.training.world import World
from tests.training.memory_plan.tiny_family import (
    BATCH_SHAPE,
    FAMILY,
    TinyChroma,
    make_model_spec,
    make_run_config,
)

KEYS = tuple(f"sample-{number}@0.0" for number in range(4))
SIGMA = torch.tensor([0.05, 0.3, 0.6, 0.95])
SHAPE = BatchShape(samples=4, size_px=(64, 64), text_rows=5)


def make_context(**options: object) -> TrainerContext:
    run = make_run_config(**{"mixed_precision": "no", "gradient_checkpointing": False, **options})
    spec = make_model_spec(run)
    network = spec.transformer
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.normal_(std=0.1, generator=generator)
    torch.manual_seed(5)
    trained = train_state.attach_trainable_parameters(run, FAMILY, network, null_emit)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    state = train_state.assemble_train_state(
        run, network, trained, train_state.make_sharding(run, World()), 1
    )
    context = make_fake_context(
        run, FAMILY, spec, SHAPE, state, TrainSchedule(9, 1, 1, 0), MemoryTrackerMode(1)
    )
    return dataclasses.replace(context, flow_options=run.flow)


def make_batch(rows: range = range(4)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 16, 8, 8, generator=generator)
    text = torch.randn(4, 5, 128, generator=generator)
    lengths = (5, 3, 5, 4)
    for sample, length in zip(text, lengths, strict=True):
        sample[length:] = 0
    whole = TextBatch({"rows": text}, {"rows": lengths})
    keys = KEYS[rows.start : rows.stop]
    return Batch(latents[rows], whole.select(rows), keys, keys)


def plain_losses(context: TrainerContext, batch: Batch, x: Tensor, target: Tensor) -> Tensor:
    velocity = FAMILY.predict_velocity(context.transformer, x, SIGMA, batch.text)
    return (velocity - target).square().flatten(1).mean(1)


def path(context: TrainerContext, batch: Batch, sigma: Tensor) -> tuple[Tensor, Tensor]:
    noise = sample_noise(batch.visit_keys, batch.latents.shape, context.seed)
    return add_noise(batch.latents, noise, sigma), velocity_target(batch.latents, noise)


def test_probability_0_is_the_plain_step_to_the_last_bit() -> None:
    context, batch = make_context(scheduled_sampling_max_step_offset=40), make_batch()
    expected = plain_losses(context, batch, *path(context, batch, SIGMA))
    assert torch.equal(loop.compute_losses(context, batch, SIGMA, 3), expected)


def test_rolled_out_samples_have_another_input_and_the_corrected_target() -> None:
    context = make_context(scheduled_sampling_probability=1.0)
    batch = make_batch()
    plan = choose_rollouts(context.flow_options, context.seed, 0, KEYS, SIGMA)
    assert plan.rows == (1, 2, 3), "sigma 0.05 is below the floor"
    x, target = path(context, batch, SIGMA)
    for row, start_sigma in zip(plan.rows, plan.start_sigma, strict=True):
        start = path(context, batch, start_sigma.expand(4))[0][row : row + 1]
        with torch.no_grad():
            velocity = FAMILY.predict_velocity(
                context.transformer, start, start_sigma[None], batch.text.select([row])
            )
        x[row] = (start + (SIGMA[row] - start_sigma) * velocity)[0]
        target[row] = (x[row] - batch.latents[row]) / SIGMA[row]
    found = loop.compute_losses(context, batch, SIGMA, 0)
    torch.testing.assert_close(found, plain_losses(context, batch, x, target))
    plain = plain_losses(context, batch, *path(context, batch, SIGMA))
    assert torch.equal(found[0], plain[0])
    assert float((found - plain).abs()[1:].min().detach()) > 1e-4


def test_a_rollout_does_not_depend_on_its_batch() -> None:
    context = make_context(scheduled_sampling_probability=0.5)
    whole = loop.compute_losses(context, make_batch(), SIGMA, 0)
    halves = [
        loop.compute_losses(context, make_batch(rows), SIGMA[list(rows)], 0)
        for rows in (range(0, 2), range(2, 4))
    ]
    torch.testing.assert_close(torch.cat(halves), whole)


def test_processes_that_share_the_network_run_it_equally_often() -> None:
    """A process without a rollout runs the pass too: the others wait for its part of the network."""

    class Sharded(World):
        equal_passes = True

    calls: dict[str, int] = {}
    for name, world, sigma in (
        ("rollouts", Sharded(), SIGMA),
        ("below the floor", Sharded(), SIGMA * 0),
        ("alone", World(), SIGMA * 0),
    ):
        context = make_context(scheduled_sampling_probability=1.0)
        calls[name] = 0

        def counted(
            *arguments: Tensor, name: str = name, real: object = context.predict_velocity
        ) -> Tensor:
            calls[name] += 1
            return real(*arguments)  # type: ignore[operator,no-any-return]

        context = dataclasses.replace(context, world=world, predict_velocity=counted)
        losses = loop.compute_losses(context, make_batch(), sigma, 0)
        assert losses.requires_grad
    assert calls == {"rollouts": 2, "below the floor": 2, "alone": 1}


def test_the_ramp_follows_the_step() -> None:
    context = make_context(scheduled_sampling_probability=1.0, scheduled_sampling_ramp_steps=10)
    batch = make_batch()
    first, last = (loop.compute_losses(context, batch, SIGMA, step) for step in (0, 10))
    plain = plain_losses(context, batch, *path(context, batch, SIGMA))
    assert torch.equal(first, plain)
    assert not torch.equal(last, plain)


def test_dropout_is_off_in_the_rollout_and_unchanged_in_training() -> None:
    """The rollout uses no number of the generator that dropout uses, and drops nothing."""
    context = make_context(scheduled_sampling_probability=1.0, lora_dropout=0.5)
    plain = make_context(lora_dropout=0.5)
    inputs = []
    for one in (context, plain):
        one.transformer.train()
        torch.manual_seed(7)
        inputs.append(loop.compute_losses(one, make_batch(), SIGMA, 0))
    assert torch.equal(inputs[0][0], inputs[1][0]), "the sample below the floor is as without"
    assert context.transformer.training
    text = make_batch().text
    x = torch.ones(2, 16, 8, 8)
    found = [loop.predict_rows(context, text, x, SIGMA[:2], (0, 1)) for _ in range(2)]
    assert torch.equal(*found)
    assert not found[0].requires_grad


def test_weights_keep_their_gradient_under_autocast() -> None:
    """The casts of the rollout, which have no gradient, are not those of the training pass."""
    run = {"mixed_precision": "bf16", "base_model_default_dtype": "fp32", "model_type": "full"}
    context = make_context(scheduled_sampling_probability=1.0, **run)
    assert context.device.autocast_dtype == torch.bfloat16
    batch = make_batch()
    loop.backward_micro_batch(context, batch, SIGMA, 4, 0, 0)
    without = [
        name
        for name, parameter in FAMILY.full_finetune_parameters(context.transformer)
        if parameter.grad is None
    ]
    assert without == []


def test_mixflow_changes_the_input_only() -> None:
    context, batch = make_context(mixflow_enabled=True, mixflow_gamma=0.5), make_batch()
    moved = mixflow_sigma(context.flow_options, context.seed, KEYS, SIGMA)
    assert float((moved - SIGMA).min()) > 0
    x, target = path(context, batch, moved)
    found = loop.compute_losses(context, batch, SIGMA, 0)
    assert torch.equal(found, plain_losses(context, batch, x, target))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_plan_counts_the_forward_pass_of_rollouts(accumulation: int) -> None:
    def predict(**options: object) -> tuple[float, float, int]:
        run = make_run_config(gradient_accumulation_steps=accumulation, **options)
        plan = predict_memory(run, TinyChroma(), (), "cuda")
        return plan.flops, plan.rollout_flops, plan.tensor_bytes

    # With rollouts the approximator stays on the device.
    flops, none, size = predict(chroma_approximator_device="accelerator")
    assert none == 0
    with_all, all_of_it, same_size = predict(scheduled_sampling_probability=1.0)
    assert with_all == flops + all_of_it
    assert same_size == size
    assert predict(scheduled_sampling_probability=0.25)[1] == pytest.approx(all_of_it / 4)
    ramp = {"scheduled_sampling_ramp_steps": 9, "scheduled_sampling_prob_end": 0.5}
    assert predict(scheduled_sampling_probability=0.25, **ramp)[1] == pytest.approx(all_of_it / 2)
    # With gradient checkpointing a LoRA's step is forward, forward again, and backward.
    assert 0.2 < all_of_it / flops < 0.4


def test_the_counted_pass_is_a_forward_pass() -> None:
    run = make_run_config(scheduled_sampling_probability=1.0)
    measured = measure_fake_step(
        run, FAMILY, make_model_spec(run), BlockMemoryPolicy(), BATCH_SHAPE, 1
    )
    spec = make_model_spec(run)
    weights = sum(
        parameter.numel() for block in spec.blocks for parameter in block.parameters()
        if parameter.dim() == 2
    )  # fmt: skip
    rows = BATCH_SHAPE.text_rows + 16 * 12
    products = 2 * weights * rows * BATCH_SHAPE.samples
    # Streams of text and image have weights of their own in double blocks; attention comes on top.
    assert 0.5 * products < measured.rollout_flops < 2 * products


def test_losses_are_multiplied_by_the_weight_of_their_noise_level() -> None:
    plain = loop.compute_losses(make_context(), make_batch(), SIGMA, 0)
    weighted = make_context(loss_weight_by_sigma="0:1, 0.3:1, 0.6:4, 1:0")
    found = loop.compute_losses(weighted, make_batch(), SIGMA, 0)
    torch.testing.assert_close(found, plain * torch.tensor([1.0, 1.0, 4.0, 0.5]))

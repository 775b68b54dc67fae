"""This package's own training step on random weights, and what its memory plan predicts for it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.cpu_stand_ins import cpu_stand_ins
from benchmarks.gpu.random_weights import RandomChroma, fill_with_random_weights
from benchmarks.gpu.timing import empty_compile_cache, measure_steps
from benchmarks.gpu.workload import Workload
from torch import Tensor, nn

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.config.load import config_from_resolved
from simpletuner.events.sinks import null_emit
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.training import loop, train_state
from simpletuner.training.device import select_device
from simpletuner.training.loop import TrainerContext, TrainSchedule
from simpletuner.training.memory_plan.fake_step import BatchShape, make_fake_context
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from simpletuner.training.memory_plan.prediction import predict_memory
from simpletuner.training.world import World

SCHEDULE_STEPS = 1000
LORA = {"lora_rank": 16, "flux_lora_target": "all+ffs"}
FULL_RANK = {
    "model_type": "full",
    "optimizer": "adamw_8bit",
    "optimizer_release_gradients": True,
    "grad_clip_method": "value",
}
ON_HOST = {"chroma_approximator_device": "cpu", "gradient_checkpointing_backend": "offload"}


@dataclass(frozen=True)
class StepCase:
    """One way to train.

    px: side of the square image. swapped: fraction of the blocks whose weights wait in host memory.
    on_host: inputs of checkpointed blocks and the approximator are in host memory, too. full_rank:
    instead of a LoRA. options: further options of the run.
    """

    px: int
    precision: str = "no_change"
    checkpointing: bool = True
    compiled: bool = False
    batch: int = 1
    swapped: float = 0.0
    on_host: bool = False
    full_rank: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run_options(self, workload: Workload, config: TransformerConfig) -> dict[str, Any]:
        """Return the options of the run, as a config file would hold them."""
        blocks = config.num_layers + config.num_single_layers
        return {
            **(FULL_RANK if self.full_rank else LORA),
            **(ON_HOST if self.on_host else {}),
            "base_model_precision": self.precision,
            "gradient_checkpointing": self.checkpointing,
            "dynamo_backend": workload.backend if self.compiled else "no",
            "device": workload.device.type,
            "resolution": float(workload.scaled_px(self.px)),
            "tokenizer_max_length": workload.text_rows,
            "train_batch_size": self.batch,
            "musubi_blocks_to_swap": round(self.swapped * blocks),
            **self.options,
        }


@dataclass
class Training:
    """A training that is ready to step. step_number: of the next step."""

    context: TrainerContext
    trained: dict[str, nn.Parameter]
    step_number: int = 0

    def step(self) -> float:
        """Run one optimizer step and return its loss."""
        loss = loop.train_step(self.context, self.step_number).loss
        self.step_number += 1
        return loss


def build_training(
    options: dict[str, Any], config: TransformerConfig, workload: Workload, px: int
) -> Training:
    """Build a training as the package does, with generated weights, latents and text.

    Equal options give equal numbers.
    """
    torch.manual_seed(0)
    run = config_from_resolved(options)
    family = RandomChroma(config)
    device = select_device(run.model)
    spec = family.build_spec(run.model, device.weights_dtype)
    network = spec.transformer
    # As in training: weights that are swapped need not fit the device even once.
    storage = torch.device("cpu") if run.model.musubi_blocks_to_swap else device.device
    fill_with_random_weights(network, device.device, storage)
    trained = train_state.attach_trainable_parameters(run, family, network, null_emit)
    train_state.configure_blocks(run, family, network, device.device)
    family.compile_blocks(network, run.model)
    state = train_state.assemble_train_state(
        run, network, trained, train_state.make_sharding(run, World()), 1
    )

    shape = BatchShape(run.training.train_batch_size, (px, px), workload.text_rows)
    schedule = TrainSchedule(SCHEDULE_STEPS, 1, SCHEDULE_STEPS, 0)
    context = make_fake_context(run, family, spec, shape, state, schedule, MemoryTrackerMode(1))
    batch = random_batch_like(context.load_batch(0))
    context = dataclasses.replace(context, device=device, load_batch=lambda number: batch)
    return Training(context, state.trainable_parameters)


def random_batch_like(empty: Batch) -> Batch:
    """Return latents and text embeddings of the same shapes with standard normal numbers."""
    generator = torch.Generator().manual_seed(0)

    def normal_like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    tensors = {name: normal_like(tensor) for name, tensor in empty.text.tensors.items()}
    text = TextBatch(tensors, empty.text.lengths)
    return Batch(normal_like(empty.latents), text, empty.sample_ids, empty.visit_keys)


def measure(workload: Workload, **fields: Any) -> Outcome:
    """Measure time, memory and kernels of a step at full size. fields: of StepCase."""
    case = StepCase(**fields)
    options = case.run_options(workload, workload.config)
    with cpu_stand_ins(workload), empty_compile_cache(workload, case.compiled):
        training = build_training(options, workload.config, workload, workload.scaled_px(case.px))
        before = copy_first_and_last(training.trained)
        figures = measure_steps(training.step, workload)
        after = copy_first_and_last(training.trained)
    failures = []
    if any(torch.equal(*pair) for pair in zip(before, after, strict=True)):
        failures.append("a trained parameter did not change")
    if not math.isfinite(figures["last_loss"]):
        failures.append(f"the loss is {figures['last_loss']}")
    trained = sum(parameter.numel() for parameter in training.trained.values())
    figures |= {"trained": trained, "batch": case.batch, "px": case.px}
    return Outcome(figures, tuple(failures))


def copy_first_and_last(trained: dict[str, nn.Parameter]) -> list[Tensor]:
    """Return copies of two parameters, which stand for all."""
    parameters = list(trained.values())
    return [parameter.detach().clone() for parameter in (parameters[0], parameters[-1])]


def predict(workload: Workload, **fields: Any) -> Outcome:
    """Predict bytes and operations of the same step by the memory plan; no GPU is needed."""
    torch.set_num_threads(1)
    run = config_from_resolved(StepCase(**fields).run_options(workload, workload.config))
    plan = predict_memory(run, RandomChroma(workload.config), kind="cuda")
    figures = {
        "parts": plan.parts,
        "allowances": plan.allowances,
        "tensors": plan.tensor_bytes,
        "training": plan.training,
        "flops": plan.flops,
        "moved": plan.moved,
    }
    return Outcome(figures)

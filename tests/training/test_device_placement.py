"""Where tensors are, on a GPU that is only pretended (pretended_device.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.random_weights import RandomChroma, fill_with_random_weights
from benchmarks.gpu.simpletuner_step import random_batch_like
from benchmarks.gpu.workload import TOY
from PIL import Image
from torch import Tensor, nn

from simpletuner.cache.batch_types import TargetWeights
from simpletuner.config.load import config_from_resolved
from simpletuner.config.schema import ModelOptions
from simpletuner.events.sinks import null_emit
from simpletuner.models import block_swap
from simpletuner.models.block_executor import BlockExecutor
from simpletuner.models.block_swap import BlockSwap, DeviceBuffer, TransferEngine
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.model_spec import CHROMA_CONSTANTS
from simpletuner.models.offloaded_inputs import OffloadedInputs
from simpletuner.training import device as devices
from simpletuner.training import loop, train_state
from simpletuner.training.device import ComputeDevice, Hardware
from simpletuner.training.loop import TrainerContext, TrainSchedule
from simpletuner.training.memory_plan.fake_step import BatchShape, make_fake_context
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from simpletuner.training.optimizers import OPTIMIZERS
from simpletuner.training.world import World
from simpletuner.validation.evaluation_model import EvaluationModel
from simpletuner.validation.inference import Inference
from simpletuner.validation.sampler import denoise, initial_noise
from tests.models.tiny_checkpoint import make_checkpoint
from tests.models.tiny_evaluation_models import make_clip
from tests.training.pretended_device import (
    GPU,
    MixedDevices,
    PlacedTensor,
    PretendedGpu,
    count_reads,
    place_module,
    place_of,
)

PX = 64


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(devices.HARDWARE_BY_TYPE, "cuda", lambda device: Hardware())
    # A module that moves then gets new parameters, because plain ones cannot carry a device.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with PretendedGpu():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def make_context(**options: Any) -> TrainerContext:
    """Return a training of a toy network whose weights are all on the pretended GPU."""
    torch.manual_seed(0)
    fixed = {"lora_rank": 4, "flux_lora_target": "all+ffs", "resolution": float(PX)}
    run = config_from_resolved({**fixed, "device": "cpu", "tokenizer_max_length": 8, **options})
    family = RandomChroma(TOY.config)
    spec = family.build_spec(run.model, torch.bfloat16)
    network = spec.transformer
    fill_with_random_weights(network, torch.device("cpu"), torch.device("cpu"))
    trained = train_state.attach_trainable_parameters(run, family, network, null_emit)
    names = {id(param): name for name, param in network.named_parameters()}
    place_module(network)
    place_module(network.distilled_guidance_layer, torch.device("cpu"))
    train_state.configure_blocks(run, family, network, GPU)
    placed = dict(network.named_parameters())
    trained = {name: placed[names[id(param)]] for name, param in trained.items()}
    state = train_state.assemble_train_state(
        run, network, trained, train_state.make_sharding(run, World()), 2
    )
    shape = BatchShape(1, (PX, PX), 8)
    context = make_fake_context(
        run,
        family,
        spec,
        shape,
        state,
        TrainSchedule(100, 2, 100, 0, sigma_chunk_steps=8),
        MemoryTrackerMode(1),
    )
    batch = random_batch_like(context.load_batch(0))
    return dataclasses.replace(
        context,
        device=ComputeDevice(GPU, torch.bfloat16, None),
        load_batch=lambda number: batch,
        ema=state.ema,
        prepare_sigmas=partial(family.prepare_sigmas, network),
    )


def test_mixing_devices_is_refused() -> None:
    """Otherwise the other tests would prove nothing."""
    on_gpu, on_host = torch.ones(2).to(GPU), torch.ones(2)
    assert place_of(on_gpu + on_gpu) == place_of(torch.zeros(2, device="cuda")) == GPU
    with pytest.raises(MixedDevices, match="add"):
        on_gpu + on_host
    layer = nn.Linear(2, 2)
    with pytest.raises(MixedDevices):
        layer(on_gpu)
    place_module(layer)
    layer(on_gpu).sum().backward()
    assert isinstance(layer.weight.grad, PlacedTensor)
    with pytest.raises(MixedDevices):
        layer.weight.grad.add_(torch.ones(2, 2))
    with count_reads() as reads:
        on_gpu.sum().item()
        on_gpu.cpu()
        on_gpu.tolist()
        on_host.tolist()
    assert reads == [3]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept": {"gradient_checkpointing": False},
    "dropout": {"lora_dropout": 0.2},
    "DoRA": {"use_dora": True},
    "PiSSA": {"lora_init_type": "pissa"},
    "LoKr": {
        "lora_type": "lycoris",
        "lycoris_config": {"algo": "lokr", "linear_dim": 4, "linear_alpha": 1, "factor": 4},
    },
    "approximator": {"chroma_approximator_device": "cpu"},
    "average": {"use_ema": True},
    "average on the host": {"use_ema": True, "ema_device": "cpu"},
    "clipped by value": {"grad_clip_method": "value"},
    "perturbed": {"input_perturbation": 0.1, "loss_type": "huber"},
    "full rank": {
        "model_type": "full",
        "optimizer": "adamw_bf16",
        "optimizer_release_gradients": True,
        "grad_clip_method": "value",
    },
    **{name: {"base_model_precision": name} for name in ("int8", "int4", "nf4", "fp8")},
    **{name: {"optimizer": name} for name in OPTIMIZERS},
}
QUICK = ("plain", "DoRA", "average", "approximator", "full rank", "nf4", "adamw_8bit", "prodigy")
# How often the host waits for the device in a step of two micro-batches, where it is not once.
# Prodigy estimates its rate; the finite loss is needed before weights change in the backward pass;
# torch's Adafactor reads a number per parameter.
READS = {"prodigy": 2, "full rank": 2, "adafactor": None}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_training_step_mixes_no_devices(case: str) -> None:
    """Two steps, and how often the host waits for the device in the second one."""
    context = make_context(**CASES[case])
    if case == "full rank":
        context = dataclasses.replace(
            context, schedule=TrainSchedule(100, 1, 100, 0, sigma_chunk_steps=8)
        )
    loop.train_step(context, 0)
    params = [param for group in context.optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    with count_reads() as reads:
        loop.train_step(context, 1)
    expected = READS.get(case, 1)
    if case == "average on the host":
        expected = 1 + len(params)
    assert expected is None or reads == [expected]
    assert all(place_of(param) == GPU for param in params)
    assert not all(map(torch.equal, before, params))


def test_masks_rollouts_and_the_bases_prediction_mix_no_devices() -> None:
    context = make_context(lora_rank=2)
    batch = context.load_batch(0)
    cells = torch.rand(1, 1, *batch.latents.shape[2:])
    weights = TargetWeights(cells, 1 - cells, (0,))
    rolled_out = {"scheduled_sampling_probability": 1.0}
    flow = context.flow_options.model_copy(update=rolled_out)
    context = dataclasses.replace(context, flow_options=flow)
    batch = dataclasses.replace(batch, weights=weights)
    sigma = torch.tensor([0.5])
    assert loop.choose_rollouts(flow, context.seed, 0, batch.visit_keys, sigma).rows
    losses = loop.compute_losses(context, batch, sigma, 0)
    losses.sum().backward()
    trained = [param for param in context.transformer.parameters() if param.requires_grad]
    assert {place_of(param.grad) for param in trained if param.grad is not None} == {GPU}
    assert place_of(losses) == GPU


class PretendedBuffer(DeviceBuffer):
    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=GPU)

    def start_copy(self, packed: Tensor) -> None:
        self.memory[: len(packed)].copy_(packed)

    def wait_for_copy(self) -> None:
        """Do nothing: the copy is complete."""

    def record_last_use(self) -> None:
        """Do nothing: the CPU computes in order."""


class PretendedEngine(TransferEngine):
    def __init__(self) -> None:
        self.copied_back = list[Tensor]()
        self._offloaded = OffloadedInputs(Tensor.cpu, self._start_copy_back)

    def pin_memory(self, packed: Tensor) -> Tensor:
        return PlacedTensor(packed, torch.device("cpu"))

    def allocate_buffer(self, size: int) -> DeviceBuffer:
        return PretendedBuffer(size)

    def offload_saved_tensors(self) -> AbstractContextManager[object]:
        return self._offloaded.save_block()

    def _start_copy_back(self, host: Tensor) -> Callable[[], Tensor]:
        assert place_of(host) == torch.device("cpu")
        self.copied_back.append(host)
        return lambda: host.to(GPU)


@pytest.mark.parametrize("precision", ["no_change", "int4"])
def test_swapped_blocks_compute_on_the_device(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights are on the host before and after, and so are the inputs of all blocks meanwhile."""
    monkeypatch.setattr(block_swap, "Tensor", PlacedTensor)  # the class of weights that it accepts
    context = make_context(base_model_precision=precision)
    network = context.transformer
    number = len(network.blocks) - 1
    place_module(network.blocks[number], torch.device("cpu"))
    for param in network.blocks[number].parameters():
        if param.requires_grad:
            param.data = param.data.to(GPU)
    trained = [param for param in network.parameters() if param.requires_grad]
    with pytest.raises(MixedDevices):
        loop.compute_losses(context, context.load_batch(0), torch.tensor([0.5]), 0)
    engine = PretendedEngine()
    swap = BlockSwap({number: network.blocks[number]}, engine)
    checkpointed = frozenset(range(number + 1))
    network.run_block = BlockExecutor(checkpointed, swap, engine.offload_saved_tensors)
    loop.compute_losses(context, context.load_batch(0), torch.tensor([0.5]), 0).sum().backward()
    assert len(engine.copied_back) >= len(network.blocks)
    assert all(place_of(param.grad) == GPU for param in trained)
    swap.close()
    frozen = [each for each in network.blocks[number].parameters() if not each.requires_grad]
    assert {place_of(param) for param in frozen} == {torch.device("cpu")}


def test_sampling_mixes_no_devices() -> None:
    context = make_context()
    family = RandomChroma(TOY.config)
    inference = Inference(family, CHROMA_CONSTANTS, GPU, torch.bfloat16)
    rows = [{"rows": torch.randn(count, TOY.config.joint_attention_dim)} for count in (5, 3)]
    noise = torch.stack([initial_noise(CHROMA_CONSTANTS, seed, (PX, PX)) for seed in (1, 2)])
    latents = denoise(
        inference,
        context.transformer,
        rows,
        noise,
        steps=2,
        guidance=3.0,
        negative_embeddings=rows[::-1],
    )
    assert place_of(latents) == torch.device("cpu")
    assert latents.shape == noise.shape


def test_encoders_and_scores_mix_no_devices(tmp_path: Path) -> None:
    """VAE, T5 and CLIP are loaded onto the device, and give results on the host."""
    options = ModelOptions(pretrained_model_name_or_path=str(make_checkpoint(tmp_path / "model")))
    family = ChromaFamily()
    source = family.locate_files(options)
    vae = family.load_vae(source, options, GPU)
    moments = vae.encode(torch.rand(1, 3, 64, 96))
    pixels = vae.decode(torch.randn(1, 16, 8, 8))
    encoder = family.load_text_encoder(source, options, GPU)
    rows = [row["rows"] for row in encoder.encode(["a cat", "a longer caption", ""])]
    clip = EvaluationModel(make_clip(tmp_path / "clip"), GPU)
    assert vae._vae.device.type == clip._network.device.type == "cuda"
    image = Image.new("RGB", (40, 30), "red")
    results = [moments, pixels, *rows, clip.embed_images([image]), clip.embed_texts(["red"])]
    assert {place_of(result) for result in results} == {torch.device("cpu")}

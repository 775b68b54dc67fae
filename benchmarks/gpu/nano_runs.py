"""Whole parts on the bundled chroma-nano: VAE, text encoder, sampler, a resumed training."""

from __future__ import annotations

import contextlib
import io
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.comparison import Comparison, Tensors
from benchmarks.gpu.equal_runs import deterministic_algorithms
from benchmarks.gpu.numerics import CPU, tf32
from benchmarks.gpu.workload import Workload
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.config.discovery import example_folder
from simpletuner.config.load import LoadedConfig, load_config
from simpletuner.config.schema import ModelOptions
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.errors import TrainingStopped
from simpletuner.events.event_log import read_events
from simpletuner.events.event_types import StepCompleted
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.fingerprints import T5_TENSOR
from simpletuner.training import run as engine
from simpletuner.validation.inference import Inference
from simpletuner.validation.sampler import denoise

EXAMPLE = "chroma-nano.peft-lora"
IMAGE_PX = 128
CAPTIONS = ("a big red star in the centre, navy background", "")
SAMPLER_STEPS = 4
GUIDANCE = 3.0
# Relative errors against float32 on the CPU, of moments, pixels, text embeddings and latents.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
MAX_RECONSTRUCTION_ERROR = 0.5  # mean absolute error of pixels in [-1, 1]; unrelated ones have more


def load_example_image() -> Tensor:
    """Return an image of the packaged example, (1, 3, 128, 128) in [-1, 1]."""
    with Image.open(example_folder(EXAMPLE) / "shapes" / "00000.png") as opened:
        resized = opened.convert("RGB").resize((IMAGE_PX, IMAGE_PX))
        pixels = np.asarray(resized, dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


def run_vae_and_sampler(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Encode and decode an image, encode captions, and denoise latents with guidance."""
    vae_dtype = "fp32" if dtype == torch.float32 else "bf16"
    options = ModelOptions(model_flavour="nano", vae_dtype=vae_dtype, device=device.type)
    family = ChromaFamily()
    files = family.locate_files(options)
    constants = family.read_constants(files)
    vae = family.load_vae(files, options, device)
    moments = vae.encode(load_example_image()).float()
    mean = moments.chunk(2, dim=1)[0]
    pixels = vae.decode((mean - constants.latent_shift) * constants.latent_scale)
    text_encoder = family.load_text_encoder(files, options, device)
    embeddings = [
        {name: tensor.float() for name, tensor in each.items()}
        for each in text_encoder.encode(CAPTIONS)
    ]
    side = IMAGE_PX // constants.stride_px
    shape = (1, constants.latent_channels, side, side)
    latents = denoise(
        Inference(family, constants, device, dtype),
        family.load_transformer(files, device, dtype),
        embeddings[:1],
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        steps=SAMPLER_STEPS,
        guidance=GUIDANCE,
        negative_embeddings=embeddings[1:],
    )
    return {
        "moments": moments,
        "pixels": pixels,
        "text embeddings": embeddings[0][T5_TENSOR],
        "denoised latents": latents,
    }


def compare_vae_and_sampler(workload: Workload) -> Outcome:
    """Compare VAE, text encoder and sampler on the GPU with float32 on the CPU."""
    comparison = Comparison()
    expected = run_vae_and_sampler(CPU, torch.float32)
    image = load_example_image()
    for dtype, tolerance in TOLERANCES.items():
        with tf32(False):
            actual = run_vae_and_sampler(workload.device, dtype)
        name = str(dtype).removeprefix("torch.")
        for part, tensor in actual.items():
            label = f"{name} {part}"
            comparison.expect_close(label, {"": tensor}, {"": expected[part]}, tolerance)
        error = float((actual["pixels"] - image).abs().mean())
        comparison.record(**{f"{name} reconstruction": error})
        comparison.expect(
            error < MAX_RECONSTRUCTION_ERROR,
            f"{name}: the decoded image differs from the encoded one by {error:.2f} on average",
        )
    return comparison.outcome()


def load_example(folder: Path, name: str, workload: Workload) -> LoadedConfig:
    """Return the packaged example's config for a short run in `folder / name`."""
    steps = workload.nano_steps
    options = {
        "output_dir": str(folder / name),
        "cache_dir": str(folder / "cache"),
        "device": workload.device.type,
        "max_train_steps": str(steps),
        "checkpoint_step_interval": str(steps // 2),
        "checkpoints_total_limit": "2",
        "lr_warmup_steps": "2",
        "lora_dropout": "0.1",
        "use_ema": "true",
        "validation_num_inference_steps": "4",
        "disable_benchmark": "true",
    }
    if workload.toy:
        options |= {"train_batch_size": "2", "validation_disable": "true"}
    config = example_folder(EXAMPLE) / "config.json"
    return load_config(list(options.items()), config_path=config, environ={}, cwd=folder)


def train_example(
    folder: Path, name: str, workload: Workload, stop_after: int | None = None
) -> Tensors:
    """Train the packaged example and return what `read_results` finds.

    stop_after: the step after which the training is stopped and started again.
    """
    loaded = load_example(folder, name, workload)
    assert loaded.config.data.data_backend_config is not None
    dataset_file = Path(loaded.config.data.data_backend_config)
    datasets = read_dataset_file(dataset_file, loaded.config.data)
    run_dir = folder / name
    build_sinks = engine.build_sinks

    def request_stop(event: object) -> None:
        if isinstance(event, StepCompleted) and event.step == stop_after:
            (run_dir / "control" / "stop").write_text("")

    def build_stopping_sinks(*arguments: object) -> list[object]:
        return [*build_sinks(*arguments), request_stop]

    with contextlib.redirect_stdout(io.StringIO()):
        if stop_after is not None:
            stopping = mock.patch.object(engine, "build_sinks", build_stopping_sinks)
            with stopping, contextlib.suppress(TrainingStopped):
                engine.run_training(loaded, datasets)
        engine.run_training(loaded, datasets)
    return read_results(run_dir, workload.nano_steps)


def read_results(run_dir: Path, steps: int) -> Tensors:
    """Return the last checkpoint's weights, optimizer states and average, and each step's loss."""
    tensors: dict[str, Tensor] = {}
    for part in ("weights", "optimizer", "ema"):
        stored = load_file(run_dir / f"checkpoint-{steps}" / f"{part}.safetensors")
        tensors |= {f"{part}/{name}": tensor for name, tensor in stored.items()}
    events = [record.event for record in read_events(run_dir / "events.jsonl")]
    losses = {event.step: event.loss for event in events if isinstance(event, StepCompleted)}
    ordered = [losses[step + 1] for step in range(steps)]
    tensors["losses"] = torch.tensor(ordered, dtype=torch.float64)
    return tensors


def compare_resumed_run(workload: Workload, exact: bool) -> Outcome:
    """Compare a training that is stopped half way and resumed with one that is not stopped.

    exact: with deterministic algorithms, where every bit must be equal. Otherwise with the usual
    algorithms: the difference is recorded, as well as that of a second run that is not stopped.
    """
    comparison = Comparison()
    algorithms: AbstractContextManager[None] = nullcontext()
    if exact:
        algorithms = deterministic_algorithms()
    with tempfile.TemporaryDirectory() as place, algorithms:
        folder = Path(place)
        straight = train_example(folder, "straight", workload)
        others = {"resumed": train_example(folder, "resumed", workload, workload.nano_steps // 2)}
        if not exact:
            others["the same run again"] = train_example(folder, "again", workload)
    for label, tensors in others.items():
        comparison.expect_bit_equal(label, tensors, straight)
    if not exact:
        comparison.failures.clear()
    losses = straight["losses"]
    comparison.expect_finite("losses", losses)
    comparison.record(first_loss=float(losses[0]), last_loss=float(losses[-1]))
    return comparison.outcome()

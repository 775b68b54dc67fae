"""The GPU's numbers against the CPU's, on 2 double and 2 single blocks of full width.

Tolerances are relative errors in the Euclidean norm. float32 products differ by the order of
summation, about 1e-6 each. TF32 keeps 10 bits of an operand and bf16 7; both sum in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.comparison import Comparison, Tensors
from benchmarks.gpu.random_weights import RandomChroma, fill_with_random_weights, random_tensor
from benchmarks.gpu.workload import Workload
from torch import Tensor, nn

from simpletuner.adapters.attachment import attach_adapter
from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.config.schema import AdapterOptions, FlowOptions
from simpletuner.flow.objective import (
    add_noise,
    loss_per_sample,
    sample_noise,
    velocity_target,
)
from simpletuner.models.chroma.fingerprints import T5_TENSOR
from simpletuner.models.chroma.lora_programs import CHROMA_LORA
from simpletuner.models.chroma.transformer import ChromaTransformer
from simpletuner.models.chroma.weights import empty_transformer
from simpletuner.quantization.quantized_linear import QuantizedLinear
from simpletuner.quantization.schemes import SCHEMES, get_scheme
from simpletuner.training.rounding_noise import (
    RoundingNoise,
    chunk_lanes,
    round_stochastically,
)

# Of the output, the loss, and the LoRA gradient with the largest error. Those of bf16 are about
# four times the difference between bf16 and float32 on a CPU, at this size.
TOLERANCES = {
    "fp32": {"output": 1e-4, "loss": 1e-4, "gradients": 1e-3},
    "tf32": {"output": 1e-2, "loss": 2e-3, "gradients": 5e-2},
    "bf16": {"output": 5e-2, "loss": 1e-2, "gradients": 2e-1},
}
UNEQUAL_BATCH_TOLERANCES = {"output": 1e-4, "gradients": 1e-3}
MAX_ROWS = 512  # of a caption
NOISE_SEED = 5
CPU = torch.device("cpu")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid float32 products on the GPU to round their operands to TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    former = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = former


def build_slice(workload: Workload, dtype: torch.dtype, storage: torch.device) -> ChromaTransformer:
    """Build the slice with a LoRA whose B is not zero, equal for all dtypes and devices."""
    torch.manual_seed(0)
    network = empty_transformer(workload.slice, dtype=dtype)
    fill_with_random_weights(network, workload.device, storage)
    network.mod_proj = network.mod_proj.to(storage)
    names = RandomChroma(workload.slice).lora_targets(network, "all+ffs")
    attached = attach_adapter(
        network, AdapterOptions(lora_rank=16), names, seed=1, names=CHROMA_LORA.names
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in attached.trainable:
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return network.train()


def make_batch(workload: Workload, lengths: Sequence[int]) -> Batch:
    """Make one sample per text length; the first samples do not depend on how many follow."""
    side = workload.slice_px // 8
    latents = []
    embeddings = []
    for index, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(index)
        latents.append(torch.randn(16, side, side, generator=generator))
        text = torch.randn(MAX_ROWS, workload.slice.joint_attention_dim, generator=generator)
        embeddings.append({T5_TENSOR: text[:length].bfloat16()})
    names = tuple(map(str, range(len(lengths))))
    return Batch(torch.stack(latents), TextBatch.stack(embeddings), names, names)


def select_sample(batch: Batch, index: int) -> Batch:
    """Return one sample of a batch without its padding."""
    length = batch.text.lengths[T5_TENSOR][index]
    one = slice(index, index + 1)
    rows = batch.text.tensors[T5_TENSOR][one, :length]
    text = TextBatch({T5_TENSOR: rows}, {T5_TENSOR: (length,)})
    return Batch(batch.latents[one], text, batch.sample_ids[one], batch.visit_keys[one])


def run_backward(
    network: ChromaTransformer, batch: Batch, workload: Workload
) -> tuple[Tensor, Tensor]:
    """Return the velocity and the loss of each sample; add the LoRA's gradients of their sum."""
    device = network.proj_out.weight.device
    sigma = torch.tensor([0.4 + 0.1 * int(key) for key in batch.visit_keys], device=device)
    noise = sample_noise(batch.visit_keys, batch.latents.shape, NOISE_SEED).to(device)
    latents = batch.latents.to(device)
    text = batch.text.to(device)
    x_sigma = add_noise(latents, noise, sigma)
    velocity = RandomChroma(workload.slice).predict_velocity(network, x_sigma, sigma, text)
    losses = loss_per_sample(velocity, velocity_target(latents, noise), sigma, FlowOptions())
    losses.sum().backward()
    return velocity.detach(), losses.detach()


def forward_and_backward(
    network: ChromaTransformer, batch: Batch, workload: Workload
) -> dict[str, Tensors]:
    """Return the velocity, the losses and the LoRA's gradients, on the CPU in float32."""
    velocity, losses = run_backward(network, batch, workload)
    gradients = {
        name: parameter.grad.float().cpu()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    network.zero_grad()
    return {
        "output": {"velocity": velocity.cpu()},
        "loss": {"loss": losses.cpu()},
        "gradients": gradients,
    }


def compare_cpu_and_gpu(workload: Workload) -> Outcome:
    """Compare output, loss and LoRA gradients on the GPU with float32 on the CPU."""
    comparison = Comparison()
    batch = make_batch(workload, [workload.text_rows])
    expected = forward_and_backward(build_slice(workload, torch.float32, CPU), batch, workload)
    for name, tolerances in TOLERANCES.items():
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        with tf32(name == "tf32"):
            network = build_slice(workload, dtype, workload.device)
            actual = forward_and_backward(network, batch, workload)
        for part, tolerance in tolerances.items():
            comparison.expect_close(f"{name} {part}", actual[part], expected[part], tolerance)
    return comparison.outcome()


def compare_unequal_batch(workload: Workload) -> Outcome:
    """Compare each sample of a batch of unequal captions with the same sample alone.

    Eager blocks attend to each sample's own rows; compiled ones use a mask. Both ways are compared.
    """
    comparison = Comparison()
    rows = workload.text_rows
    batch = make_batch(workload, [rows, rows // 3, rows // 2 + 1])
    network = build_slice(workload, torch.float32, workload.device)
    indices = range(len(batch.visit_keys))
    with tf32(False):
        alone = [
            forward_and_backward(network, select_sample(batch, index), workload)
            for index in indices
        ]
        velocity = {str(index): alone[index]["output"]["velocity"][0] for index in indices}
        names = alone[0]["gradients"]
        gradients = {
            name: torch.stack([sample["gradients"][name] for sample in alone]).sum(0)
            for name in names
        }
        for masked in (False, True):
            network.masked = masked
            together = forward_and_backward(network, batch, workload)
            parts = dict(zip(velocity, together["output"]["velocity"], strict=True))
            way = "masked" if masked else "unmasked"
            tolerance = UNEQUAL_BATCH_TOLERANCES["output"]
            comparison.expect_close(f"{way} output", parts, velocity, tolerance)
            tolerance = UNEQUAL_BATCH_TOLERANCES["gradients"]
            comparison.expect_close(f"{way} gradients", together["gradients"], gradients, tolerance)
    return comparison.outcome()


def compare_quantised_bits(workload: Workload) -> Outcome:
    """Quantise and dequantise by every scheme; compare the GPU's bits with the CPU's."""
    comparison = Comparison()
    rows, columns = workload.weight
    shapes = {"": (rows, columns), ", odd width": (rows // 8, columns - 5)}
    torch.manual_seed(0)
    for name in SCHEMES:
        for note, shape in shapes.items():
            size = torch.Size(shape)
            weight = random_tensor("weight", size, torch.bfloat16, workload.device)
            compare_scheme(comparison, f"{name}{note}", name, weight)
        compare_linear(comparison, name, workload)
    return comparison.outcome()


def compare_scheme(comparison: Comparison, label: str, scheme_name: str, weight: Tensor) -> None:
    """Compare the buffers of a weight, and what the CPU's buffers are restored to."""
    scheme = get_scheme(scheme_name)
    columns = weight.shape[1]
    buffers = scheme.quantize(weight.cpu())
    comparison.expect_bit_equal(f"{label}: quantised", scheme.quantize(weight), buffers)
    moved = {name: buffer.to(weight.device) for name, buffer in buffers.items()}
    for dtype in (torch.bfloat16, torch.float32):
        actual = scheme.dequantize(moved, columns, dtype)
        expected = scheme.dequantize(buffers, columns, dtype)
        dtype_name = str(dtype).removeprefix("torch.")
        comparison.expect_bit_equal(
            f"{label}: dequantised to {dtype_name}", {"weight": actual}, {"weight": expected}
        )


def compare_linear(comparison: Comparison, scheme_name: str, workload: Workload) -> None:
    """Compare a quantised linear with one that holds the dequantised weight, on the device."""
    rows, columns = workload.weight
    device = workload.device
    plain = nn.Linear(columns, rows, dtype=torch.bfloat16, device=device)
    plain.requires_grad_(False)
    quantized = QuantizedLinear.from_linear(plain, scheme_name)
    plain.weight.data = quantized.weight
    x = torch.randn(64, columns, dtype=torch.bfloat16, device=device)
    results = []
    for linear in (quantized, plain):
        given = x.clone().requires_grad_()
        output = linear(given)
        (gradient,) = torch.autograd.grad(output.square().sum(), given)
        results.append({"output": output.detach(), "gradient": gradient})
    comparison.expect_bit_equal(f"{scheme_name}: linear", *results)


def check_stochastic_rounding(workload: Workload) -> Outcome:
    """Expect NaN and infinities to stay, and the mean of many roundings to be the number itself."""
    comparison = Comparison()
    device = workload.device
    noise = RoundingNoise(chunk_lanes(device), 0, 1, 0)

    def rounded_with_noise(exact: Tensor) -> Tensor:
        return round_stochastically(exact, noise.bits(0, slice(0, exact.numel())))

    bits = [0x7FFFFFFF, 0x7FC00000, -1, -(1 << 22)]  # NaN as CUDA, as a CPU, and negative ones
    patterns = torch.tensor(bits, dtype=torch.int32, device=device).view(torch.float32)
    nan = torch.cat([patterns, torch.zeros(4, device=device) / 0.0]).repeat(64)
    lost = int((~rounded_with_noise(nan).isnan()).sum())
    comparison.record(nan_lost=lost, of=nan.numel())
    comparison.expect(lost == 0, f"{lost} of {nan.numel()} NaN became numbers")
    infinite = torch.tensor([float("inf"), float("-inf")], device=device).repeat(64)
    rounded = rounded_with_noise(infinite).float()
    comparison.expect(torch.equal(rounded, infinite), "infinities changed")
    fraction = 2**-10
    exact = torch.full((1 << 16,), 1 + fraction, device=device)
    mean = (float(rounded_with_noise(exact).double().mean()) - 1) / fraction
    comparison.record(mean_over_exact=mean)
    comparison.expect(0.9 < mean < 1.1, f"the mean fraction is {mean:.3f} of the exact one")
    return comparison.outcome()

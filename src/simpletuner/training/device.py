"""The compute device of a run, its dtypes, and the facts that differ between kinds of devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "no": torch.float32}
BF16_MIN_CAPABILITY = (8, 0)  # compute capability of Ampere
# Parts of the messages of allocators that are out of memory; not all raise OutOfMemoryError. cuBLAS
# and cuDNN allocate their workspaces themselves.
OUT_OF_MEMORY_PHRASES = (
    "out of memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
REQUESTED_SIZE_PATTERN = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
FREE_SIZE_PATTERN = re.compile(r"of which ([\d.]+ \w+) is free|(max allowed: [\d.]+ \w+)")


class Hardware:
    """One kind of device, here the CPU. kind: "cuda", "rocm", "mps" or "cpu". Sizes: bytes."""

    kind = "cpu"

    @property
    def name(self) -> str:
        return self.kind

    def capability(self) -> tuple[int, int] | None:
        """Return NVIDIA's compute capability; None for other devices."""
        return None

    def free_bytes(self) -> int | None:
        """Return the free device memory; None where the device uses the host's memory."""
        return None

    def peak_bytes(self) -> int | None:
        """Return the allocator's peak since reset_peak; None where it is not counted."""
        return None

    def reset_peak(self) -> None:
        """Start a new peak, so that one phase of a run does not show in the next."""

    def empty_cache(self) -> None:
        """Release the memory that the allocator caches; the CPU's allocator caches nothing."""


class CudaHardware(Hardware):
    """NVIDIA, and AMD with ROCm, which torch also names cuda."""

    def __init__(self, device: torch.device) -> None:
        self.kind = "cuda" if torch.version.hip is None else "rocm"
        self._device = device

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self._device)

    def capability(self) -> tuple[int, int] | None:
        return torch.cuda.get_device_capability(self._device) if self.kind == "cuda" else None

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()


class MpsHardware(Hardware):
    """Apple's GPU, which uses the host's memory."""

    kind = "mps"

    def free_bytes(self) -> int:
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()

    def empty_cache(self) -> None:
        torch.mps.empty_cache()


HARDWARE_BY_TYPE: dict[str, Callable[[torch.device], Hardware]] = {
    "cuda": CudaHardware,
    "mps": lambda device: MpsHardware(),
    "cpu": lambda device: Hardware(),
}


@dataclass(frozen=True)
class ComputeDevice:
    """The device and dtypes of a run.

    weights_dtype: of the network's weights. autocast_dtype: None where the weights have it already.
    caches_casts: whether autocast keeps the weights that it has cast until the forward pass ends.
    """

    device: torch.device
    weights_dtype: torch.dtype
    autocast_dtype: torch.dtype | None
    caches_casts: bool = True

    @property
    def hardware(self) -> Hardware:
        return HARDWARE_BY_TYPE[self.device.type](self.device)

    def autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(
            self.device.type, self.autocast_dtype, cache_enabled=self.caches_casts
        )

    def peak_memory_gib(self) -> float | None:
        """Return the peak of the present phase; None where it is not counted."""
        peak = self.hardware.peak_bytes()
        return None if peak is None else peak / 2**30

    def __str__(self) -> str:
        return f"{self.hardware.name}, {str(self.weights_dtype).removeprefix('torch.')} weights"


def select_device(
    options: ModelOptions, index: int = 0, caches_casts: bool = True
) -> ComputeDevice:
    """Return the device of the options, or for "auto" the best one of this machine.

    index: which GPU, for one of several processes. It becomes the current one. caches_casts: false
    for a sharded network, of which autocast would keep every block that it has cast.

    Raises ConfigError when it is not available, or does not support what the options need.
    """
    if options.torch_num_threads is not None:
        torch.set_num_threads(options.torch_num_threads)
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = (
        next(kind for kind, is_present in present.items() if is_present)
        if options.device == "auto"
        else options.device
    )
    if not present[kind]:
        available = ", ".join(kind for kind, is_present in present.items() if is_present)
        raise ConfigError(f'device = "{kind}" is not available; torch has: {available}')
    device = torch.device(kind)
    if kind == "cuda" and index:
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"process {index} of this machine needs a GPU of its own, and torch sees "
                f"{torch.cuda.device_count()}; lower num_processes"
            )
        device = torch.device(kind, index)
        torch.cuda.set_device(device)
    if missing := list(unsupported_by_hardware(HARDWARE_BY_TYPE[kind](device), options)):
        raise ConfigError("\n".join(missing))
    if kind == "cuda":
        configure_cuda(options)
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
        # Otherwise new tensors would be filled with a constant, which costs time and hides nothing.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    compute = DTYPES[options.mixed_precision]
    weights = (
        DTYPES[options.base_model_default_dtype] if options.base_model_default_dtype else compute
    )
    autocast = compute if compute != weights else None
    return ComputeDevice(device, weights, autocast, caches_casts)


def configure_cuda(options: ModelOptions) -> None:
    """Choose the precision of float32 products, and the attention kernels, for this process.

    cuDNN's attention is off: it builds a plan for each new shape, about a second each, and captions
    are trimmed to their own lengths, so nearly every batch has a new shape. torch then takes the
    flash kernel, or in float32 and with a mask the memory-efficient one; both accept any length.
    """
    torch.backends.cuda.matmul.allow_tf32 = not options.disable_tf32
    torch.backends.cudnn.allow_tf32 = not options.disable_tf32
    torch.backends.cuda.enable_cudnn_sdp(False)


def describe_attention(device: ComputeDevice) -> str | None:
    """Return which attention kernels a GPU uses; None for other devices."""
    if device.device.type != "cuda":
        return None
    dtype = device.autocast_dtype or device.weights_dtype
    kernel = "memory-efficient" if dtype == torch.float32 else "flash"
    return f"attention: the {kernel} kernel, which accepts any caption length without a new plan"


def split_when_out_of_memory(
    encode: Callable[[Tensor], Tensor], hardware: Hardware
) -> Callable[[Tensor], Tensor]:
    """Return `encode` (B, ...) -> (B, ...), which encodes one by one what does not fit together."""

    def encode_or_split(batch: Tensor) -> Tensor:
        try:
            return encode(batch)
        except RuntimeError as error:
            if len(batch) == 1 or describe_out_of_memory(error) is None:
                raise
        # Outside of the handler, whose exception refers to the tensors of the failed call.
        hardware.empty_cache()
        return torch.cat([encode(sample) for sample in batch.split(1)])

    return encode_or_split


def unsupported_by_hardware(hardware: Hardware, options: ModelOptions) -> Iterator[str]:
    """Yield a message, with the alternative, for each option that the hardware does not support."""
    capability = hardware.capability()
    this_is = f"this is {hardware.name}"
    if (
        options.mixed_precision == "bf16"
        and capability is not None
        and capability < BF16_MIN_CAPABILITY
    ):
        version = ".".join(map(str, capability))
        yield (
            f'mixed_precision = "bf16" needs compute capability 8.0 or newer; {this_is}, {version}.'
            ' Use "no", with base_model_precision "int8" or "nf4" if there is too little memory'
        )
    if options.mixed_precision == "fp16" and hardware.kind == "cpu":
        yield 'mixed_precision = "fp16" needs a GPU; use "bf16" or "no" on the CPU'
    for name in ("base_model_precision", "text_encoder_1_precision"):
        if getattr(options, name) == "fp8" and hardware.kind == "mps":
            yield (
                f'{name} = "fp8" needs a device with 8-bit floats; {this_is}. Use "int8", '
                "which has the same size and is more accurate"
            )
    has_own_memory = hardware.kind in ("cuda", "rocm")
    if options.musubi_blocks_to_swap and not has_own_memory:
        yield f"musubi_blocks_to_swap needs a GPU with its own memory; {this_is}. Use 0"
    if options.gradient_checkpointing_backend == "offload" and not has_own_memory:
        yield (
            'gradient_checkpointing_backend = "offload" needs a GPU with its own memory; '
            f'{this_is}. Use "torch"'
        )


def copy_inputs(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy the inputs of a pass without waiting; one that occurs twice is copied once."""
    copied: dict[int, Tensor] = {}
    for tensor in tensors:
        if id(tensor) not in copied:
            copied[id(tensor)] = tensor.to(device, non_blocking=True)
    return [copied[id(tensor)] for tensor in tensors]


def describe_out_of_memory(error: BaseException) -> str | None:
    """Describe an out-of-memory error with requested and free size; None for other errors."""
    text = str(error)
    if isinstance(error, MemoryError):
        return f"out of host memory{': ' if text else ''}{text}"
    if not (
        isinstance(error, RuntimeError)
        and any(mark in text.lower() for mark in OUT_OF_MEMORY_PHRASES)
    ):
        return None
    requested, free = REQUESTED_SIZE_PATTERN.search(text), FREE_SIZE_PATTERN.search(text)
    parts = [f"{requested[1]} requested" if requested else text.splitlines()[0].rstrip(".")]
    if free:
        parts.append(f"{free[1]} free" if free[1] else free[2])
    return f"out of memory: {', '.join(parts)}"

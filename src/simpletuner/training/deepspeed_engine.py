"""DeepSpeed's engine (ZeRO 1, 2 and 3) around our network, optimizer and training loop.

What the engine does: it sums the gradients over all processes, clips them by their norm, steps the
optimizer on this process's part of the weights, and gathers the weights. Everything else stays as
it is without it: samples, noise, losses, learning rates, validation, checkpoints and export.

Its mean over processes is undone, because each loss is already divided by the samples of the whole
step.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.adapters.adapted_linear import adapted_modules
from simpletuner.cache.batch_types import TextBatch
from simpletuner.config.deepspeed_config import ZeroConfig
from simpletuner.config.environment import set_missing_variables
from simpletuner.config.schema import OptimizerOptions, RunConfig
from simpletuner.errors import MissingExtra
from simpletuner.models.family import ModelFamily
from simpletuner.training.gradient_sum import GradientSum
from simpletuner.training.optimizer_step import OptimizerStep
from simpletuner.training.world import World

WEIGHTS_STAGE = 3  # the stage that shards the weights
# DeepSpeed would compile this operator when it starts on a CPU, which takes minutes; gloo does
# the same.
COMPILED_CPU_OPERATOR = "deepspeed_shm_comm"


class VelocityModule(nn.Module):
    """The family's function of the transformer as a module, which is what an engine wraps."""

    def __init__(self, family: ModelFamily, transformer: nn.Module) -> None:
        super().__init__()
        self.family = family
        self.transformer = transformer

    def forward(self, x_sigma: Tensor, sigma: Tensor, text: TextBatch) -> Tensor:
        return self.family.predict_velocity(self.transformer, x_sigma, sigma, text)


def import_deepspeed(device: torch.device, log_level: str) -> Any:
    """Import the package for this device, limit its log, and return it.

    Raises MissingExtra when it is not installed.
    """
    if device.type == "cpu":
        set_missing_variables({"DS_ACCELERATOR": "cpu"})
    logging.disable(logging.WARNING)  # its import logs which devices it finds
    try:
        import deepspeed
    except ImportError as error:
        raise MissingExtra(
            "deepspeed_config needs: pip install 'simpletuner[deepspeed]'"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    deepspeed.utils.logger.setLevel(log_level.upper())
    deepspeed.ops.__compatible_ops__[COMPILED_CPU_OPERATOR] = False
    # Advice of torch to DeepSpeed's authors, once for every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)
    return deepspeed


def engine_config(
    zero: ZeroConfig, run: RunConfig, accumulation_steps: int, trains_bf16: bool
) -> dict[str, Any]:
    """Return DeepSpeed's own configuration.

    trains_bf16: whether the trained weights are bf16, which the engine then holds in float32 too.
    An adapter's weights are float32 in a network of any dtype, so it needs no such copy.
    """
    return {
        **zero.other,
        "train_micro_batch_size_per_gpu": run.training.train_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": run.optimizer.max_grad_norm,
        # The loop calls `step` once after all passes of a step.
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": trains_bf16, "check_grad_overflow": trains_bf16},
        "zero_optimization": {
            **zero.section,
            "stage": zero.stage,
            # It would replace torch.nn.functional.linear in the whole process, and round otherwise.
            "memory_efficient_linear": False,
        },
    }


class ZeroOptimizerStep(OptimizerStep):
    """Leave the step to the engine.

    It sums, clips and applies the gradients in one call, so the weights have changed when
    `clip_gradients` returns a finite norm. Gradients that are not finite on any process are dropped
    on all, and the norm is infinite.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        optimizer: Optimizer,
        options: OptimizerOptions,
        gradient_sum: GradientSum,
        engine: Any,
    ) -> None:
        super().__init__(params, optimizer, options, gradient_sum)
        self.engine = engine

    def backward(self, loss: Tensor, place: int) -> None:
        # ZeRO divides the sum over all processes by their number.
        self.engine.backward(loss * self.gradient_sum.world.size, scale_wrt_gas=False)

    def clip_gradients(self) -> Tensor:
        # The engine sums, clips and steps in one call; the norm that it keeps is the one before
        # clipping.
        self.engine.step()
        self.weights_modified = bool(self.engine.was_step_applied())
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def apply(self) -> None:
        """Do nothing: the engine has changed the weights."""

    def zero_grad(self) -> None:
        self.weights_modified = False


def join_alone(world: World, device: torch.device) -> bool:
    """Make a process group of this process, which the engine needs; return whether it was made."""
    if world.size > 1 or dist.is_initialized():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    return True


def register_shared_weights(deepspeed: Any, transformer: nn.Module) -> None:
    """Name the weights that an adapted linear reads from the linear inside it.

    Stage 3 gathers the weights of a module before its forward pass; these are another module's.
    """
    for module in adapted_modules(transformer).values():
        # Only these: the factors are parameters of the module itself.
        for parameter in module.base_layer.parameters():
            deepspeed.zero.register_external_parameter(module, parameter)

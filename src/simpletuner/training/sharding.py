"""The layout of the network over the ranks: a whole copy for each, or a part of it (FSDP2).

The rest of the trainer asks the object that make_sharding returns, and works with the parameters
that `shard` gives back: those of an adapter are whole on every rank, those of a sharded full
fine-tuning are this rank's rows. Optimizer, average and clipping do not know the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import ConfigError
from simpletuner.events.event_types import Emit, WarningIssued
from simpletuner.models.family import ModelFamily, PredictVelocity, as_it_is
from simpletuner.models.weights.tensor_files import FileTensors, StoredSlice, WholeTensor
from simpletuner.training import checkpoint
from simpletuner.training.gradient_sum import GradientSum, TreeSum
from simpletuner.training.optimizer_step import OptimizerStep, make_optimizer_step
from simpletuner.training.parameter_groups import load_grouped_state
from simpletuner.training.world import World

# Key in a saved optimizer state of the float32 copy of a bf16 weight, which only DeepSpeed holds.
MASTER_WEIGHT = "master_weight"


class Sharding:
    """Every rank has all of the network; gradients of the trained parameters are summed.

    option: the one that chooses it. is_sharded: whether ranks hold parts of the network or of its
    optimizer's state, so that all of them must run it equally often. adapters_are_whole: whether
    every rank holds the current parameters of an adapter at any time. measures_change: whether
    the weights can be read outside of a pass, by whole_modules and flat_range.
    """

    option = ""
    is_sharded = False
    adapters_are_whole = True
    measures_change = True

    def __init__(self, world: World, trains_adapter: bool, optimizer_options: OptimizerOptions):
        self.world = world
        self.trains_adapter = trains_adapter
        self.optimizer_options = optimizer_options

    def shard(
        self,
        network: nn.Module,
        units: Sequence[nn.Module],
        trainable: Mapping[str, nn.Parameter],
        device: torch.device,
    ) -> dict[str, nn.Parameter]:
        """Divide the network among the ranks; return the parameters to train, by name.

        units: modules of the network whose weights are gathered together, such as its blocks; what
        is in none of them is gathered for the whole forward and backward pass. The network may be
        on the host; what is divided is moved to the device, unit by unit.
        """
        return dict(trainable)

    def gradient_sum(self, params: Sequence[nn.Parameter], micro_batches: int) -> GradientSum:
        """Return how the gradients of a step are summed over its micro-batches and the ranks."""
        if self.trains_adapter:
            return TreeSum(params, self.world, micro_batches)
        return GradientSum(params, self.world)

    def optimizer_step(
        self,
        name: str,
        params: Sequence[nn.Parameter],
        optimizer: Optimizer,
        options: OptimizerOptions,
        gradient_sum: GradientSum,
    ) -> OptimizerStep:
        """Return the strategy of that name (optimizer_step.py) for these parameters."""
        return make_optimizer_step(name, params, optimizer, options, gradient_sum)

    def velocity_predictor(self, family: ModelFamily, network: nn.Module) -> PredictVelocity:
        """Return the function that the loop calls for a training pass."""
        return partial(family.predict_velocity, network)

    def whole_params(
        self, params: Sequence[nn.Parameter], write: bool = False
    ) -> AbstractContextManager[None]:
        """Return a context in which these trained parameters are as pick_stored gives them.

        write: keep what the main process writes into them; every rank writes the same. Every rank
        must enter it; only one with `write` is left together.
        """
        return nullcontext()

    def whole_adapter(self) -> AbstractContextManager[None]:
        """Return such a context for all parameters of an adapter, to be read."""
        return nullcontext()

    def whole_modules(
        self, network: nn.Module, modules: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield these modules of the network by name, each while its weights are whole.

        Every rank must go through all of them.
        """
        yield from modules.items()

    def flat_range(self, name: str, param: nn.Parameter) -> tuple[int, int]:
        """Return the first number of the flat parameter that this rank holds, and how many it has.

        name, param: one of those that `shard` returned.
        """
        return 0, param.numel()

    def stored_shape(self, param: nn.Parameter) -> torch.Size:
        """Return the shape that pick_stored gives a parameter of this rank."""
        return param.shape

    def load_weights(
        self, params: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor]
    ) -> None:
        """Set the trained weights to what pick_stored returned; every rank must call it."""
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(stored[name])

    def load_optimizer_state(
        self, optimizer: Optimizer, saved: Mapping[str, Any], emit: Emit
    ) -> None:
        """Load a state_dict of the optimizer, after the weights.

        That of float32 copies of bf16 weights, which DeepSpeed holds, does not fit the weights
        here: the optimizer then starts from scratch. Raises ValueError and KeyError for the state
        of another optimizer.
        """
        if any(MASTER_WEIGHT in state for state in saved["state"].values()):
            emit(
                WarningIssued(
                    "the checkpoint has the optimizer state of float32 copies of the weights, "
                    "which only DeepSpeed holds: without deepspeed_config the optimizer starts "
                    "from scratch"
                )
            )
            return
        load_grouped_state(optimizer, saved)

    def whole_tensors(self, tensors: Mapping[str, Tensor]) -> FileTensors:
        """Return tensors that have the parameters' names and shapes, as rank 0 stores them."""
        return tensors

    def whole_optimizer_state(self, optimizer: Optimizer) -> tuple[FileTensors, dict[str, object]]:
        """Return the optimizer's state as rank 0 stores it: tensors, and the rest for JSON."""
        return checkpoint.flatten_optimizer(optimizer.state_dict())

    def pick_stored(self, stem: str, stored: StoredSlice) -> Tensor | None:
        """Return this rank's part of a tensor in a checkpoint; None where it needs none."""
        return stored.read()

    def whole(self, tensor: Tensor) -> WholeTensor:
        """Describe a parameter or buffer of the network as one tensor."""
        return as_it_is(tensor.detach())

    def local_part(self, tensor: Tensor) -> Tensor:
        """Return what this rank holds of a parameter or buffer of the network."""
        return tensor

    def close(self) -> None:
        """Release what is held besides the network."""


def require_equal_passes(sharding: Sharding, micro_batches: int) -> None:
    """Raise ConfigError where the ranks of a sharded network would not run it equally often."""
    ranks = sharding.world.size
    if not sharding.is_sharded or micro_batches % ranks == 0:
        return
    possible = [str(count) for count in range(1, micro_batches + 1) if micro_batches % count == 0]
    raise ConfigError(
        f"{sharding.option}: an optimizer step has {micro_batches} micro-batches, which {ranks} "
        "processes cannot share out equally, and every process of a sharded model must run it "
        "equally often. "
        f"Use {' or '.join(possible)} processes, or leave {sharding.option} out"
    )

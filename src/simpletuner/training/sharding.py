"""The layout of the network over the ranks: a whole copy for each, or a part of it (FSDP2).

The rest of the trainer asks the object that make_sharding returns, and works with the parameters
that `shard` gives back: those of an adapter are whole on every rank, those of a sharded full
fine-tuning are this rank's rows. Optimizer, average and clipping do not know the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import ConfigError
from simpletuner.models.weights.tensor_files import FileTensors, StoredSlice
from simpletuner.training import checkpoint
from simpletuner.training.gradient_sum import GradientSum, TreeSum
from simpletuner.training.optimizer_step import OptimizerStep, make_optimizer_step
from simpletuner.training.world import World


class Sharding:
    """Every rank has all of the network; gradients of the trained parameters are summed.

    is_sharded: whether ranks hold parts of the network, so that all of them must run it equally
    often.
    """

    is_sharded = False

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

    def whole_tensors(self, tensors: Mapping[str, Tensor]) -> FileTensors:
        """Return tensors that have the parameters' names and shapes, as rank 0 stores them."""
        return tensors

    def whole_optimizer_state(self, optimizer: Optimizer) -> tuple[FileTensors, dict[str, object]]:
        """Return the optimizer's state as rank 0 stores it: tensors, and the rest for JSON."""
        return checkpoint.flatten_optimizer(optimizer.state_dict())

    def pick_stored(self, stem: str, stored: StoredSlice) -> Tensor | None:
        """Return this rank's part of a tensor in a checkpoint; None where it needs none."""
        return stored.read()

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a parameter of the network as one tensor; every rank must call it."""
        return tensor


def require_equal_passes(sharding: Sharding, micro_batches: int) -> None:
    """Raise ConfigError where the ranks of a sharded network would not run it equally often."""
    ranks = sharding.world.size
    if not sharding.is_sharded or micro_batches % ranks == 0:
        return
    possible = [str(count) for count in range(1, micro_batches + 1) if micro_batches % count == 0]
    raise ConfigError(
        f"fsdp_enable: an optimizer step has {micro_batches} micro-batches, which {ranks} "
        "processes cannot share out equally, and every process of a sharded model must run it "
        "equally often. "
        f"Use {' or '.join(possible)} processes, or set fsdp_enable to false"
    )

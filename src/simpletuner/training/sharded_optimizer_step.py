"""The optimizer step of a sharded network where updates need whole parameters.

Each such parameter has an owner among the ranks, which holds its optimizer state. In a step the
owner gathers the rows of weights and gradient from all ranks, updates the whole parameter as one
process would, and sends the rows back. Only one whole parameter for each rank exists at a time, and
all owners compute at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.config.schema import OptimizerOptions
from simpletuner.training.gradient_sum import GradientSum
from simpletuner.training.optimizer_offload import OffloadedOptimizerState
from simpletuner.training.optimizer_step import SingleParameterStepper, StandardOptimizerStep
from simpletuner.training.parameter_shards import ParameterShard, gather_rows, scatter_rows
from simpletuner.training.world import World


class OwnerOptimizerStep(StandardOptimizerStep):
    """Compute all gradients, then step the parameters one by one: rows here, whole ones there."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        optimizer: Optimizer,
        options: OptimizerOptions,
        gradient_sum: GradientSum,
        offloaded_state: OffloadedOptimizerState | None,
        shards: Sequence[ParameterShard],
        world: World,
    ) -> None:
        super().__init__(params, optimizer, options, gradient_sum, offloaded_state)
        self.shards = shards
        self.world = world

    def apply(self) -> None:
        stepper = SingleParameterStepper(self.optimizer, self.offloaded_state)
        for shard in self.shards:
            if shard.owner is None and shard.local.grad is not None:
                stepper.step(shard.local)
        # All ranks go through the same rounds, because each exchanges with the owners.
        for shards in rounds_by_owner(self.shards):
            self._step_whole(stepper, [shard for shard in shards if shard.local.grad is not None])
        stepper.finish_step()

    def _step_whole(
        self, stepper: SingleParameterStepper, shards: Sequence[ParameterShard]
    ) -> None:
        """Step parameters of different owners: gather all, then every owner computes, then send."""
        gathered = [(shard, *self._gather(shard)) for shard in shards]
        for shard, weights, grad in gathered:
            if weights is None:
                continue
            param = shard.local
            # The optimizer's state belongs to this parameter object, so its data is exchanged, not
            # the object.
            own_rows, param.grad = param.data, None
            param.data = weights
            param.grad = grad
            stepper.step(param)
            param.grad = None
            param.data = own_rows
        for shard, weights, _ in gathered:
            assert shard.owner is not None
            scatter_rows(
                self.world, weights, shard.local.data, shard.row_counts, source=shard.owner
            )

    def _gather(self, shard: ParameterShard) -> tuple[Tensor | None, Tensor | None]:
        """Return whole weights and gradient on the owner; None on the other ranks."""
        assert shard.owner is not None
        assert shard.local.grad is not None
        weights, grad = (
            gather_rows(self.world, part, shard.row_counts, to=shard.owner)
            for part in (shard.local.data, shard.local.grad)
        )
        return weights, grad


def rounds_by_owner(shards: Sequence[ParameterShard]) -> Iterator[list[ParameterShard]]:
    """Yield groups with at most one parameter of each owner, in the order of the parameters."""
    queues: dict[int, list[ParameterShard]] = {}
    for shard in shards:
        if shard.owner is not None:
            queues.setdefault(shard.owner, []).append(shard)
    for number in range(max(map(len, queues.values()), default=0)):
        yield [queue[number] for queue in queues.values() if number < len(queue)]

"""A network of which every rank holds a part: torch's FSDP2.

fully_shard gathers the weights of a block before it runs and frees them afterwards. It shards
parameters of any dtype, quantized ones included. Three of its habits are not wanted here. It would
divide gradients by the number of ranks: losses are divided by the samples of the whole step
already, so gradients are summed. It would cast inputs under a MixedPrecisionPolicy: none is given,
because the rotary table must stay complex. And it moves what it is given to the device at once:
blocks are given one by one, so that a rank never has the whole base on its device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from simpletuner.config.schema import OptimizerOptions
from simpletuner.models.weights.tensor_files import (
    FileTensors,
    StoredSlice,
    WholeTensor,
    dtype_name,
    dtype_named,
)
from simpletuner.training.gradient_sum import GradientSum
from simpletuner.training.independent_parameter_optimizer import IndependentParameterOptimizer
from simpletuner.training.optimizer_offload import OffloadedOptimizerState
from simpletuner.training.optimizer_step import OptimizerStep
from simpletuner.training.optimizers import is_state_offloaded
from simpletuner.training.parameter_shards import (
    ParameterShard,
    assign_owners,
    gathered_tensor,
    remote_tensor,
    row_ranges,
)
from simpletuner.training.sharded_optimizer_step import OwnerOptimizerStep
from simpletuner.training.sharding import Sharding
from simpletuner.training.world import World


class Fsdp(Sharding):
    """FSDP2: every rank holds a part of each matrix.

    A LoRA's parameters, and vectors that are not trained, stay plain and whole, so that optimizer,
    average, checkpoint and export of a LoRA are those of one process.
    """

    option = "fsdp_enable"
    is_sharded = True

    def __init__(
        self,
        world: World,
        trains_adapter: bool,
        optimizer_options: OptimizerOptions,
        reshard_after_forward: bool,
    ) -> None:
        super().__init__(world, trains_adapter, optimizer_options)
        self.reshard_after_forward = reshard_after_forward
        self.shards: dict[str, ParameterShard] = {}
        self._by_index: list[ParameterShard | None] = []
        world.equal_passes = True

    def shard(
        self,
        network: nn.Module,
        units: Sequence[nn.Module],
        trainable: Mapping[str, nn.Parameter],
        device: torch.device,
    ) -> dict[str, nn.Parameter]:
        # Blocks return views, which must not be changed in place. The network changes nothing in
        # place, and the gradients equal those of one process.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        mesh = init_device_mesh(device.type, (self.world.size,))
        whole = set(trainable.values()) if self.trains_adapter else set()
        trained = set(trainable.values()) - whole
        # Vectors are small, and gathering them would cost a message each.
        whole |= {
            param for param in network.parameters() if param.ndim < 2 and param not in trained
        }
        for unit in units:
            self._shard_unit(unit, mesh, whole, self.reshard_after_forward)
        # What is in no unit is needed at both ends of a pass, and stays gathered in between.
        self._shard_unit(network, mesh, whole, False)
        network.register_forward_hook(reshard_without_gradient)
        own_memory(whole, device)
        if self.trains_adapter:
            return dict(trainable)
        self._make_local_parameters(network, {name: p.shape for name, p in trainable.items()})
        return {name: shard.local for name, shard in self.shards.items()}

    def _shard_unit(
        self, unit: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter], reshard: bool
    ) -> None:
        sharded = fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, ignored_params=whole)
        assert isinstance(sharded, FSDPModule)
        # The sum: the loss was divided by the samples of the whole step already.
        sharded.set_gradient_divide_factor(1.0)
        # Other backends than NCCL cannot divide in the reduction.
        sharded.set_force_sum_reduction_for_comms(True)

    def _make_local_parameters(self, network: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
        parameters = dict(network.named_parameters())
        ranks = self.world.size
        owners = assign_owners(shapes, ranks, self.optimizer_options.optimizer)
        for name, shape in shapes.items():
            distributed = parameters[name]
            part = local_part(distributed)
            rows = tuple(row_ranges(shape[0], ranks))
            assert len(part) == len(rows[self.world.rank]), name
            self.shards[name] = ParameterShard(
                name, tuple(shape), rows, distributed, nn.Parameter(part), owners[name]
            )

    def gradient_sum(self, params: Sequence[nn.Parameter], micro_batches: int) -> GradientSum:
        if self.trains_adapter:
            return super().gradient_sum(params, micro_batches)
        return ShardedSum(list(self.shards.values()), self.world)

    def optimizer_step(
        self,
        name: str,
        params: Sequence[nn.Parameter],
        optimizer: Optimizer,
        options: OptimizerOptions,
        gradient_sum: GradientSum,
    ) -> OptimizerStep:
        shards = list(self.shards.values())
        shard_of = {shard.local: shard for shard in shards}
        self._by_index = [
            shard_of.get(param) for group in optimizer.param_groups for param in group["params"]
        ]
        if isinstance(optimizer, IndependentParameterOptimizer):
            optimizer.first_number = {
                shard.local: shard.first_number(self.world.rank)
                for shard in shards
                if shard.owner is None
            }
        if all(shard.owner is None for shard in shards):
            return super().optimizer_step(name, params, optimizer, options, gradient_sum)
        state = (
            OffloadedOptimizerState(optimizer)
            if is_state_offloaded(options, params[0].device)
            else None
        )
        return OwnerOptimizerStep(
            params, optimizer, options, gradient_sum, state, shards, self.world
        )

    def whole_tensors(self, tensors: Mapping[str, Tensor]) -> FileTensors:
        if self.trains_adapter:
            return tensors
        return {
            name: gathered_tensor(self.world, tensor, self.shards[name].row_counts)
            for name, tensor in tensors.items()
        }

    def whole_optimizer_state(self, optimizer: Optimizer) -> tuple[FileTensors, dict[str, object]]:
        tensors, rest = super().whole_optimizer_state(optimizer)
        if self.trains_adapter:
            return tensors, rest
        described = {
            name: (dtype_name(tensor.dtype), list(tensor.shape), tensor.device.type)
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor)
        }
        parts = self.world.gather_json([described, rest["state"]])
        by_rank = [part[0] for part in parts]
        whole = {
            name: self._whole_state_tensor(name, tensors, by_rank)
            for name in dict.fromkeys(name for part in by_rank for name in part)
        }
        # Where several ranks have an entry, that of the first is taken.
        states = {index: values for part in reversed(parts) for index, values in part[1].items()}
        # As one process orders them, so that the file has the same bytes.
        rest["state"] = {index: states[index] for index in sorted(states, key=int)}
        return whole, rest

    def _whole_state_tensor(
        self,
        name: str,
        tensors: FileTensors,
        by_rank: Sequence[Mapping[str, tuple[str, list[int], str]]],
    ) -> Tensor | WholeTensor:
        """Return a tensor of the optimizer's state. by_rank: dtype, shape and device on each."""
        shard, own = self._shard_of(name), tensors.get(name)
        assert own is None or isinstance(own, Tensor)
        # Counters and settings are equal on all ranks; the state of a whole parameter is its
        # owner's.
        holder = 0 if shard is None or shard.owner is None else shard.owner
        dtype, shape, device = by_rank[holder][name]
        if shard is not None and shard.owner is None and shape:
            assert own is not None
            return gathered_tensor(self.world, own, [part[name][1][0] for part in by_rank])
        if own is not None and holder == 0:
            return own
        return remote_tensor(
            self.world, own, shape, dtype_named(dtype), holder, torch.device(device)
        )

    def _shard_of(self, name: str) -> ParameterShard | None:
        """Return the parameter that a tensor of the optimizer's state belongs to, by its name."""
        index = name.partition(".")[0]
        return self._by_index[int(index)] if index.isdigit() else None

    def pick_stored(self, stem: str, stored: StoredSlice) -> Tensor | None:
        if self.trains_adapter:
            return stored.read()
        in_optimizer = stem == "optimizer"
        shard = self._shard_of(stored.name) if in_optimizer else self.shards.get(stored.name)
        if in_optimizer and shard is not None and shard.owner is not None:
            return stored.read() if shard.owner == self.world.rank else None
        if shard is None or not stored.shape:
            return stored.read()
        if not in_optimizer and stored.shape != shard.shape:
            return torch.empty(stored.shape, device="meta")  # the caller compares the shapes
        return stored.read(shard.stored_rows(stored.shape, self.world.rank))

    def whole_modules(
        self, network: nn.Module, modules: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, nn.Module]]:
        units = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, FSDPModule)
        }

        def unit_of(item: tuple[str, nn.Module]) -> FSDPModule:
            name = item[0]
            while name and name not in units:
                name = name.rpartition(".")[0]
            return units[name]

        for unit, members in groupby(modules.items(), key=unit_of):
            unit.unshard()
            yield from members
            unit.reshard()

    def flat_range(self, name: str, param: nn.Parameter) -> tuple[int, int]:
        if self.trains_adapter:
            return super().flat_range(name, param)
        shard = self.shards[name]
        return shard.first_number(self.world.rank), math.prod(shard.shape)

    def whole(self, tensor: Tensor) -> WholeTensor:
        if not isinstance(tensor, DTensor):
            return super().whole(tensor)

        def load() -> Tensor:
            with torch.no_grad():
                whole: Tensor = tensor.full_tensor()
            return whole

        return WholeTensor(tuple(tensor.shape), tensor.dtype, load)

    def local_part(self, tensor: Tensor) -> Tensor:
        return local_part(tensor) if isinstance(tensor, DTensor) else tensor


def reshard_without_gradient(network: nn.Module, inputs: object, output: object) -> None:
    """Free what a forward pass has gathered and only a backward pass would free.

    Otherwise an evaluation on averaged weights would leave them to the next training pass.
    """
    if not torch.is_grad_enabled():
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a distributed tensor; they share its memory."""
    assert isinstance(tensor, DTensor)
    part: Tensor = tensor.to_local().detach()
    return part


def own_memory(params: Iterable[nn.Parameter], device: torch.device) -> None:
    """Move parameters that stay whole to the device; they may be views of a file before."""
    for param in params:
        param.data = param.data.to(device, copy=True)


class ShardedSum(GradientSum):
    """FSDP2 sums the gradients over ranks after every backward pass, each rank gets its rows.

    The rows become the gradients of the plain parameters that the optimizer steps.
    """

    def __init__(self, shards: Sequence[ParameterShard], world: World) -> None:
        super().__init__([shard.local for shard in shards], world)
        self.shards = shards

    def finish(self) -> None:
        for shard in self.shards:
            grad = shard.distributed.grad
            shard.local.grad = None if grad is None else local_part(grad)
            shard.distributed.grad = None

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        self.world.all_reduce(value)
        return value

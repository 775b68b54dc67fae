"""DeepSpeed's ZeRO as a layout of the network over the ranks.

The whole state can be read and written parameter by parameter, in the form that an optimizer
without DeepSpeed has it. So a checkpoint is the same with and without the engine, for every stage
and number of processes, and none of DeepSpeed's own files, which are pickles, is written or read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.config.deepspeed_config import parse_zero_config
from simpletuner.config.environment import set_missing_variables
from simpletuner.config.schema import OptimizerOptions, RunConfig
from simpletuner.events.event_types import Emit
from simpletuner.models.family import ModelFamily, PredictVelocity
from simpletuner.models.registry import get_family
from simpletuner.models.weights.tensor_files import FileTensors, WholeTensor
from simpletuner.training import checkpoint
from simpletuner.training.deepspeed_engine import (
    WEIGHTS_STAGE,
    VelocityModule,
    ZeroOptimizerStep,
    engine_config,
    import_deepspeed,
    join_alone,
    register_shared_weights,
)
from simpletuner.training.gradient_sum import GradientSum
from simpletuner.training.optimizer_step import OptimizerStep
from simpletuner.training.sharding import MASTER_WEIGHT, Sharding
from simpletuner.training.world import World


class Zero(Sharding):
    """ZeRO: every process holds a part of the optimizer's state, and with stage 3 of the network.

    With stage 3 every use of a parameter outside of a pass has to gather it first, on all processes
    together; a module's hooks do that during a pass.
    """

    option = "deepspeed_config"
    is_sharded = True
    adapters_are_whole = False
    measures_change = False

    def __init__(self, run: RunConfig, world: World) -> None:
        super().__init__(world, run.model.model_type == "lora", run.optimizer)
        self.run = run
        self.zero = parse_zero_config(run)
        self.shards_weights = self.zero.stage == WEIGHTS_STAGE
        self.parameters: list[nn.Parameter] = []
        self.micro_batches = world.size
        self._deepspeed: Any = None
        self._engine: Any = None
        self._owns_group = False
        self._is_gathering = False
        world.equal_passes = self.shards_weights

    # Building the engine

    def shard(
        self,
        network: nn.Module,
        units: Sequence[nn.Module],
        trainable: Mapping[str, nn.Parameter],
        device: torch.device,
    ) -> dict[str, nn.Parameter]:
        self.parameters = list(trainable.values())
        self._deepspeed = import_deepspeed(device, self.zero.other.get("log_level", "error"))
        self._owns_group = join_alone(self.world, device)
        set_missing_variables({"LOCAL_RANK": str(self.world.local_rank)})
        self._module = VelocityModule(get_family(self.run.model.model_family), network)
        if self.shards_weights:
            register_shared_weights(self._deepspeed, network)
            # Weight by weight, so the whole network is never on one GPU.
            self._deepspeed.zero.Init(module=self._module, config_dict_or_path=self._config())
        return dict(trainable)

    def gradient_sum(self, params: Sequence[nn.Parameter], micro_batches: int) -> GradientSum:
        self.micro_batches = micro_batches
        return GradientSum(params, self.world)

    def optimizer_step(
        self,
        name: str,
        params: Sequence[nn.Parameter],
        optimizer: Optimizer,
        options: OptimizerOptions,
        gradient_sum: GradientSum,
    ) -> OptimizerStep:
        self.optimizer = optimizer
        self._engine, *_ = self._deepspeed.initialize(
            model=self._module,
            optimizer=optimizer,
            config=self._config(),
            dist_init_required=False,
        )
        return ZeroOptimizerStep(params, optimizer, options, gradient_sum, self._engine)

    def _config(self) -> dict[str, Any]:
        accumulation = self.micro_batches // self.world.size
        return engine_config(self.zero, self.run, accumulation, self.holds_master_weights)

    @property
    def holds_master_weights(self) -> bool:
        """Return whether the engine has float32 copies of the trained weights, which are bf16."""
        return self.parameters[0].dtype == torch.bfloat16

    # The loop

    def velocity_predictor(self, family: ModelFamily, network: nn.Module) -> PredictVelocity:
        return cast(PredictVelocity, self._engine)

    # Checkpoints and export

    def stored_shape(self, param: nn.Parameter) -> torch.Size:
        whole: torch.Size = vars(param).get("ds_shape", param.shape)
        return whole

    @contextmanager
    def whole_params(self, params: Sequence[nn.Parameter], write: bool = False) -> Iterator[None]:
        # An inner context would free at its end what the outer one has gathered.
        if not self.shards_weights or self._is_gathering:
            yield
            return
        self._is_gathering = True
        try:
            gather = self._deepspeed.zero.GatheredParameters
            with gather(params, modifier_rank=0 if write else None):
                yield
        finally:
            self._is_gathering = False

    def whole_adapter(self) -> AbstractContextManager[None]:
        return self.whole_params(self.parameters) if self.trains_adapter else nullcontext()

    def whole(self, tensor: Tensor) -> WholeTensor:
        if not is_partitioned(tensor):
            return super().whole(tensor)
        param = cast(nn.Parameter, tensor)
        return self._on_main(param, param.dtype, partial(self._gather, param))

    def _gather(self, param: nn.Parameter) -> Tensor:
        with self.whole_params([param]):
            return param.detach().to("cpu", copy=True)

    def whole_tensors(self, tensors: Mapping[str, Tensor]) -> FileTensors:
        return {
            name: (tensor if tensor.shape == self.stored_shape(param) else self.whole(param))
            for (name, tensor), param in zip(tensors.items(), self.parameters, strict=True)
        }

    def whole_optimizer_state(self, optimizer: Optimizer) -> tuple[FileTensors, dict[str, object]]:
        """Return the state that the optimizer would have without the engine.

        The float32 copies of bf16 weights are a part of it.
        """
        # The engine has one state for all weights that it updates, of which each weight is a part.
        flat = self._flat_parameters()[0]
        held: Mapping[str, Any] = optimizer.state.get(flat, {})
        utils = self._deepspeed.utils
        state: dict[int, dict[str, Any]] = {}
        whole: dict[str, WholeTensor] = {}
        for index, param in enumerate(self.parameters):
            state[index] = {
                key: value for key, value in held.items() if not is_per_weight(value, flat.shape)
            }
            for key in held.keys() - state[index].keys():
                read = partial(utils.safe_get_full_optimizer_state, param, key)
                # Read when the file is written, one after the other.
                whole[f"{index}.{key}"] = self._on_main(param, held[key].dtype, read)
            if self.holds_master_weights:
                read = partial(utils.safe_get_full_fp32_param, param)
                whole[f"{index}.{MASTER_WEIGHT}"] = self._on_main(param, torch.float32, read)
        group = {**optimizer.param_groups[0], "params": list(range(len(self.parameters)))}
        tensors, rest = checkpoint.flatten_optimizer({"state": state, "param_groups": [group]})
        return {**tensors, **whole}, rest

    def _on_main(
        self, param: nn.Parameter, dtype: torch.dtype, read: Callable[[], Tensor]
    ) -> WholeTensor:
        """Describe a tensor of the parameter's shape; all processes call `read` together."""

        def load() -> Tensor | None:
            tensor = read()
            return tensor.detach().cpu() if self.world.is_main else None

        return WholeTensor(tuple(self.stored_shape(param)), dtype, load)

    def load_weights(
        self, params: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor]
    ) -> None:
        for name, param in params.items():
            with self.whole_params([param], write=True), torch.no_grad():
                param.copy_(stored[name])
        # The engine steps its float32 copies; without this it would overwrite the loaded weights.
        self._engine.optimizer.refresh_fp32_params()

    def load_optimizer_state(
        self, optimizer: Optimizer, saved: Mapping[str, Any], emit: Emit
    ) -> None:
        (group,), own = saved["param_groups"], optimizer.param_groups[0]
        if group.keys() != own.keys() or len(group["params"]) != len(self.parameters):
            raise ValueError("it has other settings or other parameters")
        own.update({key: value for key, value in group.items() if key != "params"})
        states: Mapping[int, Mapping[str, Any]] = saved["state"]
        moments = {key: v for key, v in states.get(0, {}).items() if key != MASTER_WEIGHT}
        if moments:
            shape = self.stored_shape(self.parameters[0])
            for flat in self._flat_parameters():
                optimizer.state[flat] = {
                    key: torch.zeros_like(flat.data)
                    if is_per_weight(value, shape)
                    else copy_value(value)
                    for key, value in moments.items()
                }
            if not self.shards_weights:
                # Stages 1 and 2 link each weight to its part of the state only after a first step.
                self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for index, param in enumerate(self.parameters):
            for key, value in states.get(index, {}).items():
                if is_per_weight(value, self.stored_shape(param)):
                    self._write_own_part(param, key, value)

    def _write_own_part(self, param: nn.Parameter, key: str, whole: Tensor) -> None:
        """Set this process's part of a whole tensor of the optimizer's state."""
        utils = self._deepspeed.utils
        if not self.shards_weights:
            value = whole.to(param.device, torch.float32)
            if key == MASTER_WEIGHT:
                utils.safe_set_full_fp32_param(param, value)
            else:
                utils.safe_set_full_optimizer_state(param, value, key)
            return
        # Stage 3 cuts each weight into equal parts; the last one is padded.
        size = vars(param)["ds_tensor"].numel()
        part = torch.zeros(size, dtype=torch.float32, device=param.device)
        own = whole.reshape(-1)[self.world.rank * size : (self.world.rank + 1) * size]
        part[: len(own)] = own
        if key == MASTER_WEIGHT:
            utils.safe_set_local_fp32_param(param, part)
        else:
            utils.safe_set_local_optimizer_state(param, part, key)

    def _flat_parameters(self) -> list[Tensor]:
        """Return the float32 parts of all weights that this process updates."""
        zero_optimizer = self._engine.optimizer
        if self.shards_weights:
            return list(zero_optimizer.fp32_partitioned_groups_flat)
        return list(zero_optimizer.single_partition_of_fp32_groups)

    def local_part(self, tensor: Tensor) -> Tensor:
        if not is_partitioned(tensor):
            return tensor
        facts = vars(tensor)
        if facts["ds_persist"]:  # a small one, which is whole from the first pass on
            return torch.empty(facts["ds_shape"], dtype=tensor.dtype, device="meta")
        part: Tensor = facts["ds_tensor"]
        return part

    def close(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether stage 3 holds only a part of this parameter here, in its `ds_tensor`."""
    return "ds_tensor" in vars(tensor) and tensor.shape != vars(tensor)["ds_shape"]


def is_per_weight(value: Any, shape: torch.Size) -> bool:
    """Return whether a value of an optimizer's state has one number for each weight."""
    return isinstance(value, Tensor) and value.shape == shape


def copy_value(value: Any) -> Any:
    """Return a value of an optimizer's state that shares no memory with this one."""
    return value.clone() if isinstance(value, Tensor) else value

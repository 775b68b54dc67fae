"""A configuration file of accelerate, read as options of this program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simpletuner.errors import ConfigError, Problem

MAX_FILE_BYTES = 1 << 20
# Keys that have the name and meaning of an option here, or are handled by name below.
OPTION_KEYS = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "same_network",
)
DYNAMO_KEYS: Mapping[str, str] = {
    "dynamo_backend": "dynamo_backend",
    "dynamo_mode": "dynamo_mode",
    "dynamo_use_dynamic": "dynamo_dynamic",
    "dynamo_use_fullgraph": "dynamo_fullgraph",
    "dynamo_use_regional_compilation": "dynamo_use_regional_compilation",
}
FSDP_KEYS = (
    "fsdp_version",
    "fsdp_reshard_after_forward",
    "fsdp_state_dict_type",
    "fsdp_auto_wrap_policy",
    "fsdp_transformer_layer_cls_to_wrap",
    "fsdp_cpu_ram_efficient_loading",
    "fsdp_activation_checkpointing",
)
# FSDP1's strategies: whether FSDP2 frees gathered weights after the forward pass.
RESHARD_BY_STRATEGY: Mapping[str, bool] = {"FULL_SHARD": True, "SHARD_GRAD_OP": False}
# Choices of FSDP1 and of its loading that FSDP2 makes itself, whatever they are.
IGNORED_FSDP_KEYS = (
    "fsdp_backward_prefetch",
    "fsdp_backward_prefetch_policy",
    "fsdp_forward_prefetch",
    "fsdp_use_orig_params",
    "fsdp_sync_module_states",
    "fsdp_min_num_params",
)
# distributed_type -> the option that it turns on, "" for none.
DISTRIBUTED_TYPES: Mapping[str, str] = {
    "NO": "",
    "MULTI_GPU": "",
    "MULTI_CPU": "",
    "FSDP": "fsdp_enable",
    "DEEPSPEED": "deepspeed_config",
}
# Keys without a meaning for this program.
IGNORED_KEYS = (
    "compute_environment",
    "debug",
    "distributed_type",
    "downcast_bf16",
    "dynamo_config",
    "enable_cpu_affinity",
    "fsdp_config",
    "deepspeed_config",
    "gpu_ids",
    "main_training_function",
    "mixed_precision",
    "mpirun_config",
    "rdzv_backend",
    "use_cpu",
)
IGNORED_KEY_PREFIXES = ("tpu_", "ipex_", "mpirun_")


@dataclass(frozen=True)
class ReadKey:
    """One option that the file gives. location: where, for messages."""

    option: str
    value: Any
    location: str


class AccelerateFile:
    """The file, parsed. Raises ConfigError unless it holds a YAML object. name: for messages."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.problems: list[Problem] = []
        text = _read_text(path, name)
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            self.content = yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
            raise ConfigError([Problem(place, f"is not YAML: {error.problem}")]) from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError([Problem(name, f"is not YAML: {error}")]) from None
        if not isinstance(self.content, dict):
            raise ConfigError([Problem(name, "must hold the settings of accelerate, key: value")])
        self.positions = dict(_positions(root))

    def options(self) -> Iterator[ReadKey]:
        """Yield what the file gives; what is refused is added to `problems`."""
        kind = self._distributed_type()
        for key in self.content:
            known = key in OPTION_KEYS or key in IGNORED_KEYS
            if not known and not str(key).startswith(IGNORED_KEY_PREFIXES):
                self._refuse((key,), f"{key}: is not a key of accelerate that is read here")
        for key in OPTION_KEYS:
            if self.content.get(key) is not None and (kind != "NO" or key != "num_processes"):
                yield self._read((key,), key)
        if kind == "NO" and self.content.get("num_processes") not in (None, 1, "1"):
            self._refuse(
                ("num_processes",),
                f"num_processes = {self.content['num_processes']}: distributed_type NO is one "
                "process; use MULTI_GPU",
            )
        gpus = self.content.get("gpu_ids")
        if gpus is not None and str(gpus).strip().lower() != "all":
            yield self._read(("gpu_ids",), "accelerate_visible_devices")
        if self.content.get("use_cpu"):
            yield ReadKey("device", "cpu", self._locate(("use_cpu",)))
        yield from self._read_dynamo()
        if kind == "FSDP":
            yield ReadKey("fsdp_enable", True, self._locate(("distributed_type",)))
            yield from self._read_fsdp()
        if kind == "DEEPSPEED":
            yield self._read_deepspeed()

    def _distributed_type(self) -> str:
        environment = str(self.content.get("compute_environment", "LOCAL_MACHINE"))
        if environment != "LOCAL_MACHINE":
            self._refuse(
                ("compute_environment",),
                f"compute_environment = {environment}: is not supported; allowed: LOCAL_MACHINE",
            )
        written = self.content.get("distributed_type", "MULTI_GPU")
        # YAML reads a bare NO as false.
        kind = "NO" if written is False else str(written).upper()
        if kind not in DISTRIBUTED_TYPES:
            self._refuse(
                ("distributed_type",),
                f"distributed_type = {kind}: is not supported; allowed: "
                f"{', '.join(DISTRIBUTED_TYPES)}",
            )
        return kind

    def _read_dynamo(self) -> Iterator[ReadKey]:
        for key, option in DYNAMO_KEYS.items():
            value = self._section("dynamo_config").get(key)
            if value is not None:
                word = "no" if value is False and key == "dynamo_backend" else value
                yield ReadKey(option, word, self._locate(("dynamo_config", key)))

    def _read_fsdp(self) -> Iterator[ReadKey]:
        section = self._section("fsdp_config")
        for key, value in section.items():
            path = ("fsdp_config", key)
            if key == "fsdp_reshard_after_forward" and value in RESHARD_BY_STRATEGY:
                yield ReadKey(key, RESHARD_BY_STRATEGY[value], self._locate(path))
            elif key in FSDP_KEYS:
                yield self._read(path, key)
            elif key == "fsdp_offload_params":
                yield self._read(path, "fsdp_cpu_offload")
            elif key == "fsdp_sharding_strategy":
                if value in RESHARD_BY_STRATEGY:
                    option = "fsdp_reshard_after_forward"
                    yield ReadKey(option, RESHARD_BY_STRATEGY[value], self._locate(path))
                else:
                    allowed = ", ".join(RESHARD_BY_STRATEGY)
                    self._refuse(path, f"{key} = {value}: is not supported; allowed: {allowed}")
            elif key not in IGNORED_FSDP_KEYS:
                self._refuse(path, f"{key}: is not a key of accelerate that is read here")

    def _read_deepspeed(self) -> ReadKey:
        """Return deepspeed_config: the file that is named, or the object that the keys mean."""
        section = dict(self._section("deepspeed_config"))
        location = self._locate(("deepspeed_config",))
        file = section.get("deepspeed_config_file")
        if file is not None:
            return ReadKey("deepspeed_config", str(file), location)
        zero: dict[str, Any] = {"stage": section.get("zero_stage", 2)}
        for part in ("offload_optimizer", "offload_param"):
            device = str(section.get(f"{part}_device") or "none").lower()
            if device != "none":
                zero[part] = {"device": device}
                if section.get(f"{part}_nvme_path") is not None:
                    zero[part]["nvme_path"] = section[f"{part}_nvme_path"]
        config: dict[str, Any] = {"zero_optimization": zero}
        for key in ("gradient_accumulation_steps", "gradient_clipping"):
            if section.get(key) is not None:
                config[key] = section[key]
        return ReadKey("deepspeed_config", config, location)

    def _section(self, key: str) -> Mapping[str, Any]:
        section = self.content.get(key)
        if section is None:
            return {}
        if not isinstance(section, dict):
            self._refuse((key,), f"{key}: must be an object, key: value")
            return {}
        return section

    def _read(self, path: tuple[str, ...], option: str) -> ReadKey:
        value: Any = self.content
        for key in path:
            value = value[key]
        return ReadKey(option, value, self._locate(path))

    def _locate(self, path: tuple[str, ...]) -> str:
        line, column = self.positions.get(path, (1, 1))
        return f"{self.name}:{line}:{column}"

    def _refuse(self, path: tuple[str, ...], message: str) -> None:
        self.problems.append(Problem(self._locate(path), message))


def _read_text(path: Path, name: str) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError([Problem(name, "is too large for a configuration of accelerate")])
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError([Problem(name, f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(name, f"is not UTF-8 text (byte {error.start})")]) from None


def _positions(
    node: yaml.Node | None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], tuple[int, int]]]:
    """Yield the path of each key and its line and column, from 1."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        inner = (*path, str(key.value))
        yield inner, (key.start_mark.line + 1, key.start_mark.column + 1)
        yield from _positions(value, inner)

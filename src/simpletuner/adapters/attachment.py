"""Attach a LoRA or its relatives to a network: which modules, initial values, strength."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.adapters.adapted_linear import (
    AdaptedLinear,
    LoraLinear,
    LycorisLinear,
    adapted_modules,
)
from simpletuner.adapters.deltas import Delta, DeltaT, LowRankDelta, LycorisDelta
from simpletuner.adapters.dora_linear import DoraLinear
from simpletuner.adapters.lora_file import LoraFileSummary, read_lora_file
from simpletuner.adapters.lycoris_init import init_lycoris, warm_start_lycoris
from simpletuner.adapters.module_names import ModuleNames
from simpletuner.config import lycoris_config
from simpletuner.config.constraints import BASE_DERIVED_INITS
from simpletuner.config.lycoris_config import LycorisConfig
from simpletuner.config.patterns import match_patterns
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ConfigError, ModelError
from simpletuner.randomness import seed_at


@dataclass(frozen=True)
class AttachedAdapter:
    """Result of attaching an adapter. modules, parameters: counts.

    scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA, of the first module. trainable: (name,
    parameter) in module order, with the names of PEFT's state dict ("<module>.lora_A.weight") or of
    LyCORIS. initialized_from: summary of the init_lora file, if any.
    """

    modules: int
    parameters: int
    scale: float
    trainable: list[tuple[str, nn.Parameter]]
    initialized_from: LoraFileSummary | None = None


def attach_adapter(
    transformer: nn.Module,
    options: AdapterOptions,
    target_names: Sequence[str],
    seed: int,
    names: ModuleNames,
    dtype: torch.dtype = torch.float32,
    lycoris_settings: Mapping[str, LycorisConfig] | None = None,
) -> AttachedAdapter:
    """Adapt the linears `target_names` (full module names) in place and freeze the rest.

    alpha defaults to the rank of each module. A is initialized from (seed, module name),
    independent of the order of the names. OLoRA and PiSSA leave the base unmodified: their initial
    factors are stored with A and B and subtracted, so that the exported file (of twice the rank)
    and strength 0 are correct for the original base.

    names: the architecture's name table. dtype: of the trained parameters. lycoris_settings: those
    of each module with lora_type lycoris; None is lycoris_config for all. Raises ConfigError or
    ModelError for unknown modules, a network that already has an adapter, and modules that no file
    of lora_format can hold.
    """
    _check_combinations(options, target_names, names)
    lycoris: Mapping[str, LycorisConfig] = lycoris_settings or {}
    if options.lora_type == "lycoris" and lycoris_settings is None:
        lycoris = dict.fromkeys(target_names, lycoris_config.require_lycoris_config(options))
    bases = _find_base_linears(transformer, target_names)
    ranks = _module_ranks(options, list(bases))
    # Read before any adapter is built: a wrong file must leave the network as it is.
    initial_deltas: dict[str, Delta] = {}
    initialized_from = None
    if options.init_lora is not None:
        initial_deltas, initialized_from = _load_init_lora(
            Path(options.init_lora), bases, options, names, lycoris, ranks
        )
    adapters = {
        name: _build_adapter(
            name,
            base,
            ranks[name],
            options,
            initial_deltas.get(name),
            seed,
            dtype,
            lycoris.get(name),
        )
        for name, base in bases.items()
    }
    _install_adapters(transformer, adapters)
    trainable = trainable_parameters(transformer)
    parameters = sum(parameter.numel() for _, parameter in trainable)
    scale = next(iter(adapters.values())).scale
    return AttachedAdapter(len(adapters), parameters, scale, trainable, initialized_from)


def attach_adapter_from_file(
    transformer: nn.Module, path: Path, names: ModuleNames, strength: float
) -> LoraFileSummary:
    """Adapt the modules that a file names, each with the file's rank, and freeze the result."""
    deltas, summary = read_lora_file(path, names).to_deltas_and_summary()
    adapters: dict[str, AdaptedLinear] = {}
    for name, base in _find_base_linears(
        transformer, summary.modules, f"{path} was made for another network"
    ).items():
        delta = _check_shape(path, name, deltas[name], base)
        if isinstance(delta, LycorisDelta):
            adapters[name] = LycorisLinear(base, _to_base_device(delta, base))
            continue
        pair = _to_base_device(delta, base)
        if pair.magnitude is None:
            adapters[name] = LoraLinear(base, pair.down, pair.up)
        else:
            adapters[name] = DoraLinear(base, pair.down, pair.up, row_norms=pair.magnitude)
    _install_adapters(transformer, adapters)
    transformer.requires_grad_(False)
    set_strength(transformer, strength)
    return summary


def set_strength(transformer: nn.Module, strength: float) -> None:
    """Set the strength of every adapted module: 1 as trained, 0 exactly the base."""
    for module in adapted_modules(transformer).values():
        module.strength = float(strength)


@contextmanager
def adapter_disabled(transformer: nn.Module) -> Iterator[None]:
    """Switch every adapted module off, so that the network is exactly its base; then on again."""
    with scaled_adapter(transformer, 0.0):
        yield


@contextmanager
def scaled_adapter(transformer: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the strength of every adapted module; afterwards it is as before."""
    modules = list(adapted_modules(transformer).values())
    strengths = [module.strength for module in modules]
    for module in modules:
        module.strength *= factor
    try:
        yield
    finally:
        for module, strength in zip(modules, strengths, strict=True):
            module.strength = strength


def trainable_parameters(transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the adapter's parameters by their names in a state dict, in module order."""
    modules = adapted_modules(transformer).items()
    return [
        (f"{name}{suffix}", parameter)
        for name, module in modules
        for suffix, parameter in module.adapter_parameters().items()
    ]


def _module_ranks(options: AdapterOptions, names: Sequence[str]) -> dict[str, int]:
    """Return the rank of each module. Raises ConfigError for a pattern without a module."""
    try:
        given, unused = match_patterns(options.lora_rank_by_module or {}, names)
    except ValueError as error:
        raise ConfigError(f"lora_rank_by_module: {error}") from error
    if unused:
        raise ConfigError(
            f"lora_rank_by_module: no module of this LoRA is matched by {unused[0]!r}, which must "
            f"match a whole name such as {names[0]}"
        )
    return {name: given.get(name, options.lora_rank) for name in names}


def _check_combinations(
    options: AdapterOptions, target_names: Sequence[str], names: ModuleNames
) -> None:
    """Refuse targets that lora_format cannot hold now, instead of when the file is written."""
    non_block = [name for name in target_names if name in names.modules_outside_blocks]
    if options.lora_format == "kohya" and non_block:
        raise ConfigError(
            f'lora_format "kohya" can only hold modules inside the blocks, but lora_target_modules'
            f' includes {non_block[0]}; use lora_format "comfyui"'
        )


def _find_base_linears(
    transformer: nn.Module, names: Sequence[str], context: str = "cannot attach a LoRA"
) -> dict[str, nn.Linear]:
    """Return the linears of these names, quantized or not, in the network's order."""
    modules = dict(transformer.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        problem = (
            f"the network has no {', '.join(unknown[:3])}" if unknown else "no module was named"
        )
        remainder = f" (and {len(unknown) - 3} more of {len(names)})" if len(unknown) > 3 else ""
        raise ModelError(f"{context}: {problem}{remainder}")
    # A second adapter would wrap the first one, and its file would miss that part.
    if adapted_modules(transformer):
        raise ModelError("this network already has an adapter; load the base again for another one")
    requested = set(names)
    linears = {}
    for name, module in modules.items():
        if name in requested:
            if not isinstance(module, nn.Linear):
                raise ModelError(f"{context}: {name} is not a linear module")
            linears[name] = module
    return linears


def _install_adapters(transformer: nn.Module, adapters: Mapping[str, AdaptedLinear]) -> None:
    """Put the adapters into the network in its train or eval mode, and freeze the base."""
    transformer.requires_grad_(False)
    for name, module in adapters.items():
        transformer.set_submodule(name, module.train(transformer.training))


@torch.no_grad()
def _build_adapter(
    name: str,
    base: nn.Linear,
    rank: int,
    options: AdapterOptions,
    initial_delta: Delta | None,
    seed: int,
    dtype: torch.dtype,
    lycoris: LycorisConfig | None,
) -> AdaptedLinear:
    """Build the adapter of one linear. initial_delta: from init_lora, or None."""
    generator = torch.Generator().manual_seed(seed_at(seed, "lora_init", name))
    if lycoris is not None:
        initial = init_lycoris(lycoris, (base.out_features, base.in_features), generator)
        initial = (
            warm_start_lycoris(initial_delta, initial, name)
            if isinstance(initial_delta, LycorisDelta)
            else initial
        )
        return LycorisLinear(base, _to_base_device(initial, base, dtype), options.lora_dropout)
    alpha = rank if options.lora_alpha is None else options.lora_alpha
    # rsLoRA (arXiv 2312.03732): outputs keep their size as the rank grows.
    scale = alpha / (rank**0.5 if options.use_rslora else rank)
    principal = options.lora_init_type in BASE_DERIVED_INITS
    if principal:
        factors = LowRankDelta(*_init_from_base_weight(name, base, rank, options, scale, generator))
    else:
        factors = _init_low_rank(base, rank, options, generator)
    if isinstance(initial_delta, LowRankDelta):
        # A file's delta has its scale folded in, and this module multiplies by its own again.
        # A smaller rank fills the first rows; B is zero for the others.
        factors.down[: initial_delta.rank], factors.up[:, : initial_delta.rank] = (
            initial_delta.down,
            initial_delta.up / scale,
        )
    factors = _to_base_device(factors, base, dtype)
    if options.use_dora:
        row_norms = None if initial_delta is None else initial_delta.magnitude
        return DoraLinear(base, factors.down, factors.up, scale, options.lora_dropout, row_norms)
    return LoraLinear(base, factors.down, factors.up, scale, options.lora_dropout, principal)


def _init_low_rank(
    base: nn.Linear, rank: int, options: AdapterOptions, generator: torch.Generator
) -> LowRankDelta:
    shape = (rank, base.in_features)
    if options.lora_init_type == "gaussian":
        # Standard deviation 1 / rank, as PEFT has it.
        down = torch.randn(shape, generator=generator) / rank
    else:
        # Kaiming uniform with a = sqrt(5), the default of nn.Linear: bound 1 / sqrt(in)
        down = (2 * torch.rand(shape, generator=generator) - 1) * base.in_features**-0.5
    # B is 0, so that the first step starts from the base exactly.
    return LowRankDelta(down, torch.zeros(base.out_features, rank))


def _init_from_base_weight(
    name: str,
    base: nn.Linear,
    rank: int,
    options: AdapterOptions,
    scale: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return (A, B): PiSSA (arXiv 2404.02948) by truncated SVD, OLoRA (2406.01775) by QR."""
    if rank > min(base.weight.shape):
        raise ConfigError(
            f"lora_init_type = {options.lora_init_type!r} needs lora_rank <="
            f" {min(base.weight.shape)} for {name}, but its rank is {rank}"
        )
    # MPS has neither decomposition. The random basis is always drawn on the CPU, so that a run that
    # is moved to another device starts from the same factors.
    weight = base.weight.to("cpu") if base.weight.device.type == "mps" else base.weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if options.lora_init_type == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    # The oversampling of 5 to 10 columns that they advise.
    sketch_size = min(rank + 8, *weight.shape)
    basis = torch.randn(weight.shape[1], sketch_size, generator=generator).to(weight)
    for _ in range(5):  # subspace iteration: algorithm 4.4 of Halko, Martinsson and Tropp (2011)
        basis = torch.linalg.qr(weight.t() @ torch.linalg.qr(weight @ basis).Q).Q
    u, s, v = torch.linalg.svd(weight @ basis, full_matrices=False)
    # Half of each singular value in A and half in B; the scale is applied at each use.
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * (v @ basis.t())[:rank], u[:, :rank] * root


def _load_init_lora(
    path: Path,
    bases: Mapping[str, nn.Linear],
    options: AdapterOptions,
    names: ModuleNames,
    lycoris: Mapping[str, LycorisConfig],
    ranks: Mapping[str, int],
) -> tuple[dict[str, Delta], LoraFileSummary]:
    """Load init_lora. Ranks below those of the modules are zero-padded later."""
    deltas, summary = read_lora_file(path, names).to_deltas_and_summary()
    where = f"init_lora = {str(path)!r} ({summary.layout} layout)"
    # A partial start would silently train the other modules from 0.
    if set(deltas) != set(bases):
        missing, surplus = sorted(set(bases) - set(deltas)), sorted(set(deltas) - set(bases))
        raise ConfigError(
            f"{where} adapts other modules than this run: {len(missing)} missing"
            f" ({', '.join(missing[:2])}), {len(surplus)} unexpected ({', '.join(surplus[:2])});"
            " set flux_lora_target or lora_target_modules to the modules of the file"
        )
    expected_kind = "dora" if options.use_dora else "lora"
    if options.lora_type == "lycoris":
        expected_kind = " and ".join(sorted({config.algo for config in lycoris.values()}))
    if summary.kind.lower() != expected_kind:
        prefix = 'lora_type = "standard" and use_dora = '
        settings = {"LoRA": f"{prefix}false", "DoRA": f"{prefix}true"}
        lycoris_setting = f'lora_type = "lycoris" and algo {summary.kind.lower()} in lycoris_config'
        setting = settings.get(summary.kind, lycoris_setting)
        raise ConfigError(f"{where} is a {summary.kind}; set {setting}")
    for name in bases if options.lora_type == "standard" else ():
        if (rank := deltas[name].rank) > ranks[name]:
            of_module = f" for {name}" if options.lora_rank_by_module else ""
            raise ConfigError(
                f"{where} has rank {rank}, but lora_rank is {ranks[name]}{of_module}; set lora_rank"
                f" to {summary.ranks[-1]}, or reduce the file with: simpletuner export --format"
                " diffusers --rank N"
            )
    for name, base in bases.items():
        _check_shape(path, name, deltas[name], base)
    return deltas, summary


def _to_base_device(delta: DeltaT, base: nn.Linear, dtype: torch.dtype = torch.float32) -> DeltaT:
    """Move a delta to the base's device without dequantizing the base's weight."""
    # Not base.weight, which a quantized base would restore for this.
    device = next(iter(base.state_dict().values())).device
    if isinstance(delta, LycorisDelta):
        factors = {name: factor.to(device, dtype) for name, factor in delta.factors.items()}
        return LycorisDelta(factors, delta.scale, delta.rows)
    magnitude = None if delta.magnitude is None else delta.magnitude.to(device, dtype)
    down, up = (factor.to(device, dtype).contiguous() for factor in (delta.down, delta.up))
    return LowRankDelta(down, up, magnitude)


def _check_shape(path: Path, name: str, delta: Delta, base: nn.Linear) -> Delta:
    needed = base.out_features, base.in_features
    if delta.shape != needed:
        sizes = " x ".join(map(str, delta.shape)), " x ".join(map(str, needed))
        mismatch = f"{name} is {sizes[0]}, this network needs {sizes[1]}"
        raise ModelError(f"{path}: {mismatch}; it was trained on a model of another size")
    return delta

"""Putting a LoRA on a network: which modules, how it starts, how strong it acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.adapters import layouts
from simpletuner.adapters.adapted_linear import (
    AdaptedLinear,
    DoraLinear,
    LoraLinear,
    LycorisLinear,
    adapted_modules,
)
from simpletuner.adapters.compatibility import NON_BLOCK_MODULES
from simpletuner.adapters.deltas import Delta, DeltaT, LowRankDelta, LycorisDelta
from simpletuner.adapters.lycoris_init import init_lycoris, warm_start_lycoris
from simpletuner.config import lycoris_config
from simpletuner.config.constraints import BASE_DERIVED_INITS
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ConfigError, ModelError
from simpletuner.randomness import seed_at


@dataclass(frozen=True)
class AttachedAdapter:
    """modules, parameters: counts. scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    trainable: (name, parameter) in module order; names as in PEFT's state dict,
    "<module>.lora_A.weight", or LyCORIS'. continued: the file it goes on from.
    """

    modules: int
    parameters: int
    scale: float
    trainable: list[tuple[str, nn.Parameter]]
    initialized_from: layouts.LoraFileSummary | None = None


def attach_adapter(
    transformer: nn.Module,
    options: AdapterOptions,
    target_names: Sequence[str],
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> AttachedAdapter:
    """Adapt the linears `target_names` (full module names) in place; everything else is frozen.

    alpha defaults to the rank. A is drawn from (seed, module name), whatever the order of the names.
    olora and pissa leave the base as it is: the start is kept beside A and B and subtracted, so a file
    (of twice the rank) and strength 0 stay right for the untouched base.
    dtype: of what is trained. Refuses unknown modules, a network that has an adapter, and modules that no
    file of lora_format could hold (ConfigError, ModelError).
    """
    _check_combinations(options, target_names)
    bases = _find_base_linears(transformer, target_names)
    told: dict[str, Delta] = {}
    goes_on = None
    if options.init_lora is not None:
        told, goes_on = _load_init_lora(Path(options.init_lora), bases, options)
    made = {
        name: _build_adapter(name, base, options, told.get(name), seed, dtype)
        for name, base in bases.items()
    }
    _install_adapters(transformer, made)
    trainable = trainable_parameters(transformer)
    parameters = sum(parameter.numel() for _, parameter in trainable)
    return AttachedAdapter(
        len(made), parameters, next(iter(made.values())).scale, trainable, goes_on
    )


def attach_adapter_from_file(
    transformer: nn.Module, path: Path, strength: float
) -> layouts.LoraFileSummary:
    """Adapt the modules a file names, each with the file's rank, and freeze the result."""
    deltas, summary = layouts.read_lora_file(path).to_deltas_and_summary()
    made: dict[str, AdaptedLinear] = {}
    for name, base in _find_base_linears(
        transformer, summary.modules, f"{path} was made for another network"
    ).items():
        delta = _check_shape(path, name, deltas[name], base)
        if isinstance(delta, LycorisDelta):
            made[name] = LycorisLinear(base, _to_base_device(delta, base))
            continue
        pair = _to_base_device(delta, base)
        if pair.magnitude is None:
            made[name] = LoraLinear(base, pair.down, pair.up)
        else:
            made[name] = DoraLinear(base, pair.down, pair.up, lengths=pair.magnitude)
    _install_adapters(transformer, made)
    transformer.requires_grad_(False)
    set_strength(transformer, strength)
    return summary


def set_strength(transformer: nn.Module, strength: float) -> None:
    """1 is as trained, 0 is the base, bit for bit; any other number scales the delta."""
    for module in adapted_modules(transformer).values():
        module.strength = float(strength)


def trainable_parameters(transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The adapter's parameters by their names in a state dict, in module order."""
    modules = adapted_modules(transformer).items()
    return [
        (f"{name}{end}", one)
        for name, module in modules
        for end, one in module.adapter_parameters().items()
    ]


def _check_combinations(options: AdapterOptions, target_names: Sequence[str]) -> None:
    """Here and not after hours, when the file is written."""
    outer = [name for name in target_names if name in NON_BLOCK_MODULES]
    if options.lora_format == "kohya" and outer:
        what = f"reaches the blocks only, and lora_target_modules names {outer[0]}"
        raise ConfigError(f'lora_format "kohya" {what}; use "comfyui"')


def _find_base_linears(
    transformer: nn.Module, names: Sequence[str], context: str = "cannot attach a LoRA"
) -> dict[str, nn.Linear]:
    """The linears of these names, quantised or not, in the network's order."""
    modules = dict(transformer.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        what = f"the network has no {', '.join(unknown[:3])}" if unknown else "no module was named"
        more = f" (and {len(unknown) - 3} more of {len(names)})" if len(unknown) > 3 else ""
        raise ModelError(f"{context}: {what}{more}")
    if adapted_modules(transformer):
        raise ModelError("this network has an adapter already; load the base again for another one")
    wanted, found = set(names), {}
    for name, module in modules.items():
        if name in wanted:
            if not isinstance(module, nn.Linear):
                raise ModelError(f"{context}: {name} is no linear")
            found[name] = module
    return found


def _install_adapters(transformer: nn.Module, made: Mapping[str, AdaptedLinear]) -> None:
    """What is in place follows the network's mode, dropout with it; the base is frozen."""
    transformer.requires_grad_(False)
    for name, module in made.items():
        transformer.set_submodule(name, module.train(transformer.training))


@torch.no_grad()
def _build_adapter(
    name: str,
    base: nn.Linear,
    options: AdapterOptions,
    told: Delta | None,
    seed: int,
    dtype: torch.dtype,
) -> AdaptedLinear:
    """told: the delta to go on from."""
    generator = torch.Generator().manual_seed(seed_at(seed, "lora_init", name))
    if options.lora_type == "lycoris":
        product = init_lycoris(
            lycoris_config.require_lycoris_config(options),
            (base.out_features, base.in_features),
            generator,
        )
        product = (
            warm_start_lycoris(told, product, name) if isinstance(told, LycorisDelta) else product
        )
        return LycorisLinear(base, _to_base_device(product, base, dtype), options.lora_dropout)
    rank = options.lora_rank
    alpha = rank if options.lora_alpha is None else options.lora_alpha
    scale = alpha / (rank**0.5 if options.use_rslora else rank)
    principal = options.lora_init_type in BASE_DERIVED_INITS
    if principal:
        start = LowRankDelta(*_init_from_base_weight(name, base, options, scale, generator))
    else:
        start = _init_low_rank(base, options, generator)
    if isinstance(
        told, LowRankDelta
    ):  # of a smaller rank it takes the first rows; the others add nothing yet
        start.down[: told.rank], start.up[:, : told.rank] = told.down, told.up / scale
    start = _to_base_device(start, base, dtype)
    if options.use_dora:
        lengths = None if told is None else told.magnitude
        return DoraLinear(base, start.down, start.up, scale, options.lora_dropout, lengths)
    return LoraLinear(base, start.down, start.up, scale, options.lora_dropout, principal)


def _init_low_rank(
    base: nn.Linear, options: AdapterOptions, generator: torch.Generator
) -> LowRankDelta:
    shape = (options.lora_rank, base.in_features)
    if options.lora_init_type == "gaussian":
        down = torch.randn(shape, generator=generator) / options.lora_rank
    else:
        # Kaiming uniform with a = sqrt(5), the default of nn.Linear: bound 1 / sqrt(in)
        down = (2 * torch.rand(shape, generator=generator) - 1) * base.in_features**-0.5
    return LowRankDelta(down, torch.zeros(base.out_features, options.lora_rank))


def _init_from_base_weight(
    name: str, base: nn.Linear, options: AdapterOptions, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """PiSSA (arXiv 2404.02948): r largest singular triplets. OLoRA (arXiv 2406.01775): r columns of QR."""
    rank = options.lora_rank
    if rank > min(base.weight.shape):
        raise ConfigError(
            f"lora_init_type = {options.lora_init_type!r}: lora_rank <= {min(base.weight.shape)} in {name}"
        )
    # MPS has neither decomposition. The sketch is the CPU's everywhere: a run that moves keeps its start.
    weight = base.weight.to("cpu") if base.weight.device.type == "mps" else base.weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if options.lora_init_type == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    wide = min(rank + 8, *weight.shape)
    basis = torch.randn(weight.shape[1], wide, generator=generator).to(weight)
    for _ in range(5):  # subspace iteration, algorithm 4.4 of Halko, Martinsson and Tropp 2011
        basis = torch.linalg.qr(weight.t() @ torch.linalg.qr(weight @ basis).Q).Q
    u, s, v = torch.linalg.svd(weight @ basis, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * (v @ basis.t())[:rank], u[:, :rank] * root


def _load_init_lora(
    path: Path, bases: Mapping[str, nn.Linear], options: AdapterOptions
) -> tuple[dict[str, Delta], layouts.LoraFileSummary]:
    """What each module goes on from. Smaller ranks than the run's get rows more, whose delta is zero."""
    deltas, summary = layouts.read_lora_file(path).to_deltas_and_summary()
    where = f"init_lora = {str(path)!r} ({summary.layout} layout)"
    if set(deltas) != set(bases):
        lacking, surplus = sorted(set(bases) - set(deltas)), sorted(set(deltas) - set(bases))
        raise ConfigError(
            f"{where} adapts other modules than this run: {len(lacking)} missing ({', '.join(lacking[:2])}), "
            f"{len(surplus)} too many ({', '.join(surplus[:2])}); set flux_lora_target alike"
        )
    asked = "dora" if options.use_dora else "lora"
    if options.lora_type == "lycoris":
        asked = lycoris_config.require_lycoris_config(options).algo
    if summary.kind.lower() != asked:
        plain = 'lora_type = "standard" and use_dora = '
        ways = {"LoRA": f"{plain}false", "DoRA": f"{plain}true"}
        own = f'lora_type = "lycoris" and algo {summary.kind.lower()} in lycoris_config'
        way = ways.get(summary.kind, own)
        raise ConfigError(f"{where} is a {summary.kind}; set {way}")
    if options.lora_type == "standard" and (rank := summary.ranks[-1]) > options.lora_rank:
        way = f"set it to {rank}, or make the file smaller: simpletuner export --format diffusers --rank N"
        raise ConfigError(f"{where} has rank {rank} and lora_rank is {options.lora_rank}; {way}")
    for name, base in bases.items():
        _check_shape(path, name, deltas[name], base)
    return deltas, summary


def _to_base_device(start: DeltaT, base: nn.Linear, dtype: torch.dtype = torch.float32) -> DeltaT:
    """To where the base lies: asking a quantised one for its weight would restore it."""
    device = next(iter(base.state_dict().values())).device
    if isinstance(start, LycorisDelta):
        parts = {name: part.to(device, dtype) for name, part in start.factors.items()}
        return LycorisDelta(parts, start.scale, start.rows)
    length = None if start.magnitude is None else start.magnitude.to(device, dtype)
    down, up = (one.to(device, dtype).contiguous() for one in (start.down, start.up))
    return LowRankDelta(down, up, length)


def _check_shape(path: Path, name: str, delta: Delta, base: nn.Linear) -> Delta:
    needed = base.out_features, base.in_features
    if delta.shape != needed:
        sizes = " x ".join(map(str, delta.shape)), " x ".join(map(str, needed))
        what = f"{name} is {sizes[0]}, this network needs {sizes[1]}"
        raise ModelError(f"{path}: {what}: it was made for another size")
    return delta

"""Putting a LoRA on a network: which modules, how it starts, how strong it acts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.adapters import layouts
from simpletuner.adapters.linear import ADAPTER, AdaptedLinear, DoraLinear, LoraLinear, adapted
from simpletuner.adapters.loaders import OUTSIDE_BLOCKS
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ConfigError, ModelError
from simpletuner.randomness import seed_at

# These take the base's principal part into A and B, instead of a delta of zero.
FROM_BASE = ("olora", "pissa")


@dataclass(frozen=True)
class Attached:
    """modules, parameters: counts. scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    trainable: (name, parameter) in module order; names as in PEFT's state dict,
    "<module>.lora_A.weight", without the adapter's name. continued: the file it goes on from.
    """

    modules: int
    parameters: int
    scale: float
    trainable: list[tuple[str, nn.Parameter]]
    continued: layouts.FileSummary | None = None


def attach(
    transformer: nn.Module,
    options: AdapterOptions,
    target_names: Sequence[str],
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Attached:
    """Adapt the linears `target_names` (full module names) in place; everything else is frozen.

    alpha defaults to the rank. A is drawn from (seed, module name), whatever the order of the names.
    olora and pissa leave the base as it is: the start is kept beside A and B and subtracted, so a file
    (of twice the rank) and strength 0 stay right for the untouched base.
    dtype: of A and B. Refuses unknown modules, a network that has an adapter, and combinations that no
    file could express (ConfigError, ModelError).
    """
    _refuse_combinations(options, target_names)
    alpha = float(options.lora_rank) if options.lora_alpha is None else options.lora_alpha
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
    )
    modules = _inject(transformer, config, target_names)
    for name, module in modules.items():
        module.cast_adapter(dtype)
        _start(name, module, options, seed)
    continued = None
    if options.init_lora is not None:
        continued = _continue_from(Path(options.init_lora), modules, options)
    trainable = trainable_parameters(transformer)
    first = next(iter(modules.values()))
    parameters = sum(parameter.numel() for _, parameter in trainable)
    return Attached(len(modules), parameters, first.scale, trainable, continued)


def attach_file(transformer: nn.Module, path: Path, strength: float) -> layouts.FileSummary:
    """Adapt the modules a file names, each with the file's rank, and freeze the result."""
    factors, summary = layouts.read(path).opened()
    ranks = {f"^{re.escape(name)}": one.rank for name, one in factors.items()}
    config = LoraConfig(rank_pattern=ranks, alpha_pattern=dict(ranks), use_dora=summary.dora)
    modules = _inject(transformer, config, summary.modules, f"{path} was made for another network")
    for name, module in modules.items():
        module.cast_adapter(torch.float32)
        _load(path, name, module, factors[name])
        module.requires_grad_(False)
    set_strength(transformer, strength)
    return summary


def set_strength(transformer: nn.Module, strength: float) -> None:
    """1 is as trained, 0 is the base, bit for bit; any other number scales the delta."""
    for module in adapted(transformer).values():
        module.strength = float(strength)


def trainable_parameters(transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The adapter's parameters by PEFT's state-dict names, in module order."""
    found: list[tuple[str, nn.Parameter]] = []
    for name, module in adapted(transformer).items():
        found.append((name + layouts.DOWN, module.down))
        found.append((name + layouts.UP, module.up))
        if module.magnitude is not None:
            found.append((name + layouts.MAGNITUDE, module.magnitude))
    return found


def _refuse_combinations(options: AdapterOptions, target_names: Sequence[str]) -> None:
    """Here and not after hours, when the file is written."""
    outer = [name for name in target_names if name in OUTSIDE_BLOCKS]
    if options.lora_format == "kohya" and outer:
        what = f"reaches the blocks only, and lora_target_modules names {outer[0]}"
        raise ConfigError(f'lora_format "kohya" {what}; use "comfyui"')
    if options.lora_init_type in FROM_BASE and options.use_dora:
        raise ConfigError(
            f"lora_init_type = {options.lora_init_type!r} cannot be combined with use_dora: no file layout "
            "can express the result on the untouched base; use lora_init_type = 'default'"
        )
    if options.lora_init_type in FROM_BASE and options.init_lora is not None:
        raise ConfigError(
            f"lora_init_type = {options.lora_init_type!r} and init_lora both say how A and B start; "
            "remove one of them"
        )


def _inject(
    transformer: nn.Module, config: LoraConfig, names: Sequence[str], context: str = "cannot attach a LoRA"
) -> dict[str, AdaptedLinear]:
    """PEFT's own wiring with our linears, on exactly these modules."""
    modules = dict(transformer.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        what = f"the network has no {', '.join(unknown[:3])}" if unknown else "no module was named"
        more = f" (and {len(unknown) - 3} more of {len(names)})" if len(unknown) > 3 else ""
        raise ModelError(f"{context}: {what}{more}")
    if adapted(transformer):
        raise ModelError("this network has an adapter already; load the base again for another one")
    # A list would match name endings too: "proj_out" also means every block's proj_out.
    config.target_modules = "|".join(re.escape(name) for name in names)
    config._register_custom_module({nn.Module: DoraLinear if config.use_dora else LoraLinear})
    for name in names:
        transformer.set_submodule(name, _stand_in(modules[name]))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        inject_adapter_in_model(config, transformer, ADAPTER)
    for name, module in adapted(transformer).items():
        module.adopt(modules[name].requires_grad_(False))
    transformer.train(transformer.training)  # new modules follow the network's mode, dropout with them
    return adapted(transformer)


def _stand_in(linear: nn.Module) -> nn.Linear:
    """Its shape on its device, one number in memory.

    PEFT asks twenty times for a weight to see where it lies, and a quantised one is restored each time: at
    full size nine minutes, and 9 GB of holes between the new factors.
    """
    if not isinstance(linear, nn.Linear):
        raise ModelError(f"a LoRA adapts linears only, not {type(linear).__name__}")
    made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    device = next(iter(linear.state_dict().values())).device
    made.weight = nn.Parameter(torch.zeros(1, 1, device=device).expand(made.weight.shape), False)
    return made


@torch.no_grad()
def _start(name: str, module: AdaptedLinear, options: AdapterOptions, seed: int) -> None:
    down, up = module.down, module.up
    if options.lora_init_type in FROM_BASE and isinstance(module, LoraLinear):
        start_down, start_up = _principal(name, module, options, seed)
        down.copy_(start_down)
        up.copy_(start_up)
        module.start_down, module.start_up = down.clone(), up.clone()
        return
    generator = torch.Generator().manual_seed(seed_at(seed, "lora_init", name))
    if options.lora_init_type == "gaussian":
        drawn = torch.randn(down.shape, generator=generator) / options.lora_rank
    else:
        # Kaiming uniform with a = sqrt(5), the default of nn.Linear: bound 1 / sqrt(in)
        drawn = (2 * torch.rand(down.shape, generator=generator) - 1) * down.shape[1] ** -0.5
    down.copy_(drawn)
    up.zero_()
    if module.magnitude is not None and isinstance(module.base_layer, nn.Linear):
        weight = module.base_layer.weight.to(module.magnitude.dtype)
        module.magnitude.copy_(torch.linalg.vector_norm(weight, dim=1))


def _principal(name: str, module: LoraLinear, options: AdapterOptions, seed: int) -> tuple[Tensor, Tensor]:
    """PiSSA (arXiv 2404.02948): r largest singular triplets. OLoRA (arXiv 2406.01775): r columns of QR."""
    base, rank = module.base_layer, options.lora_rank
    if not isinstance(base, nn.Linear):
        raise ConfigError(f"lora_init_type = {options.lora_init_type!r} needs plain weights; {name} has none")
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
    generator = torch.Generator().manual_seed(seed_at(seed, "lora_init", name))
    wide = min(rank + 8, *weight.shape)
    basis = torch.randn(weight.shape[1], wide, generator=generator).to(weight)
    for _ in range(5):  # subspace iteration, algorithm 4.4 of Halko, Martinsson and Tropp 2011
        basis = torch.linalg.qr(weight.t() @ torch.linalg.qr(weight @ basis).Q).Q
    u, s, v = torch.linalg.svd(weight @ basis, full_matrices=False)
    root = (s[:rank] / module.scale).sqrt()
    return root[:, None] * (v @ basis.t())[:rank], u[:, :rank] * root


def _continue_from(
    path: Path, modules: Mapping[str, AdaptedLinear], options: AdapterOptions
) -> layouts.FileSummary:
    """Modules of a smaller rank than the file's largest get rows more, whose delta is zero."""
    factors, summary = layouts.read(path).opened()
    where = f"init_lora = {str(path)!r} ({summary.layout} layout)"
    if set(factors) != set(modules):
        lacking, surplus = sorted(set(modules) - set(factors)), sorted(set(factors) - set(modules))
        raise ConfigError(
            f"{where} adapts other modules than this run: {len(lacking)} missing ({', '.join(lacking[:2])}), "
            f"{len(surplus)} too many ({', '.join(surplus[:2])}); set flux_lora_target alike"
        )
    if summary.ranks[-1] != options.lora_rank:
        raise ConfigError(f"{where} has rank {summary.ranks[-1]} and lora_rank is {options.lora_rank}")
    if summary.dora != options.use_dora:
        raise ConfigError(f"{where} is {'a' if summary.dora else 'no'} DoRA; set use_dora = {summary.dora}")
    for name, module in modules.items():
        _load(path, name, module, factors[name])
    return summary


@torch.no_grad()
def _load(path: Path, name: str, module: AdaptedLinear, factors: layouts.Factors) -> None:
    """The file's delta, whatever alpha this module has; of a smaller rank it takes the first rows."""
    down, up, rank = module.down, module.up, factors.rank
    if factors.down.shape[1] != down.shape[1] or factors.up.shape[0] != up.shape[0]:
        raise ModelError(
            f"{path}: {name} is {tuple(factors.up.shape)} x {tuple(factors.down.shape)}, "
            f"this network needs {tuple(up.shape)} x {tuple(down.shape)}: it was made for another size"
        )
    down[:rank].copy_(factors.down)
    up[:, :rank].copy_(factors.up / module.scale)
    up[:, rank:].zero_()
    if factors.magnitude is not None and module.magnitude is not None:
        module.magnitude.copy_(factors.magnitude.reshape(module.magnitude.shape))

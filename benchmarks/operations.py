"""Count the operations of a training step, beside those of diffusers and PEFT in the same run.

    python -m benchmarks.operations --label now

Writes benchmarks/results/operations.json and operations.md; the counts of other labels in the file
stay, so that a change can be shown beside what it was before (run the command with PYTHONPATH set
to another version's `src`). About a CPU minute; no weights and no network.

An operation is what torch dispatches to a backend and is not a view: on a GPU a kernel, or for the
operations on lists (`_foreach_*`) and `cat` a few kernels. They are counted by a dispatch mode. A
count does not depend on the width of the network, so whole steps run on one of 19 double and 38
single blocks that is 64 numbers wide, on the CPU. Two things differ from a GPU there, and are
counted as a GPU runs them: torch has a fused kernel for RMSNorm, and its own optimizer and clipping
use lists. The optimizers have parameters and groups of a 64th of the full size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from benchmarks.gpu import diffusers_step
from benchmarks.gpu.random_weights import RandomChroma
from benchmarks.gpu.simpletuner_step import LORA, build_training
from benchmarks.gpu.workload import TOY, Workload
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.config.schema import OptimizerOptions
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.chroma.weights import empty_transformer
from simpletuner.training.optimizers import OPTIMIZERS, build_optimizer

RESULTS = Path(__file__).parent / "results"
PX = 512
RANK = 16
SCALE = 64
GROUP_SIZES = (
    ("simpletuner.training.flat_parameters", "GROUP_NUMBERS"),
    ("simpletuner.training.gradient_sum", "BUCKET_BYTES"),
)
STEP_CASES: dict[str, dict[str, Any]] = {
    "`all+ffs`, kept": {},
    "`all+ffs`, recomputed": {"gradient_checkpointing": True},
    "`all`, kept": {"flux_lora_target": "all"},
    "`all+ffs`, kept, EMA": {"use_ema": True, "ema_device": "accelerator"},
    "`all+ffs`, kept, int8 base": {"base_model_precision": "int8"},
}
rms_norm = F.rms_norm


class OperationCounter(TorchDispatchMode):
    """Counts operations and views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.views = 0
        self._inside_one = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside_one:
            self.views += func.is_view
            self.operations += not func.is_view
        return func(*args, **(kwargs or {}))

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Count everything inside as one operation."""
        self.operations += 1
        self._inside_one = True
        try:
            yield
        finally:
            self._inside_one = False


class FusedRmsNorm(torch.autograd.Function):
    """RMSNorm as one operation, and its gradient as one."""

    @staticmethod
    def forward(ctx: Any, counter: OperationCounter, x: Tensor, shape: Any, weight: Any, eps: Any):
        ctx.counter, ctx.rest = counter, (shape, weight, eps)
        ctx.save_for_backward(x)
        with counter.as_one():
            return rms_norm(x, shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with ctx.counter.as_one(), torch.enable_grad():
            x = x.detach().requires_grad_()
            (grad_x,) = torch.autograd.grad(rms_norm(x, *ctx.rest), x, grad)
        return None, grad_x, None, None, None


def count(step: Callable[[], object]) -> dict[str, int]:
    """Return the operations and views of the second call, when all state exists."""
    step()
    counter = OperationCounter()
    with patch.object(F, "rms_norm", partial(FusedRmsNorm.apply, counter)), counter:
        step()
    return {"operations": counter.operations, "views": counter.views}


def deep_workload() -> Workload:
    """Return the toy size with as many blocks as the real network."""
    deep = TransformerConfig()
    blocks = {"num_layers": deep.num_layers, "num_single_layers": deep.num_single_layers}
    return dataclasses.replace(TOY, config=dataclasses.replace(TOY.config, **blocks))


def count_own_step(workload: Workload, options: dict[str, Any]) -> dict[str, int]:
    px = workload.scaled_px(PX)
    fixed = {"device": "cpu", "resolution": float(px), "gradient_checkpointing": False}
    return count(build_training({**fixed, **LORA, **options}, workload.config, workload, px).step)


def count_diffusers_step(workload: Workload, trimmed: bool) -> dict[str, int]:
    """Count a step of diffusers and PEFT on the same modules, kept; clipping and AdamW by lists."""
    case = diffusers_step.DiffusersCase(PX, trimmed=trimmed, checkpointing=False)
    clip = partial(nn.utils.clip_grad_norm_, foreach=True)
    with (
        patch.object(torch.optim, "AdamW", partial(torch.optim.AdamW, foreach=True)),
        patch.object(nn.utils, "clip_grad_norm_", clip),
    ):
        network, adapters = diffusers_step.build_network(case, workload)
        return count(diffusers_step.make_step(network, adapters, case, workload))


def lora_shapes() -> list[tuple[int, int]]:
    """Return the shapes of all factors at full size, 836 of rank 16."""
    config = TransformerConfig()
    network = empty_transformer(config)
    names = RandomChroma(config).lora_targets(network, str(LORA["flux_lora_target"]))
    linears = [network.get_submodule(name) for name in names]
    return [
        shape
        for linear in linears
        for shape in ((RANK, linear.in_features), (linear.out_features, RANK))
    ]


@contextmanager
def small_groups() -> Iterator[None]:
    """Divide parameters into as many groups as at full size, where each is SCALE times larger."""
    with ExitStack() as patches:
        for module, name in GROUP_SIZES:
            if find_spec(module) is not None:  # an earlier version may not have it
                target = import_module(module)
                size = vars(target)[name] // SCALE
                patches.enter_context(patch.object(target, name, size))
        yield


def count_optimizer(name: str) -> dict[str, int]:
    """Count a step of an optimizer over all factors of a LoRA."""
    params = [
        nn.Parameter(
            torch.full(
                [side if side == RANK else side // SCALE for side in shape], shape[0] == RANK
            ).float()
        )
        for shape in lora_shapes()
    ]
    options = OptimizerOptions(optimizer=name)
    named = [(str(number), param) for number, param in enumerate(params)]
    optimizer = build_optimizer(options, named, seed=0)
    for param in params:
        param.grad = torch.ones_like(param)
    with small_groups():
        return count(optimizer.step)


def measure() -> dict[str, dict[str, int]]:
    torch.set_num_threads(1)
    workload = deep_workload()
    rows = {f"step: {name}": count_own_step(workload, each) for name, each in STEP_CASES.items()}
    rows["step: diffusers + PEFT, `all+ffs`, kept, trimmed"] = count_diffusers_step(workload, True)
    rows["step: diffusers + PEFT, `all+ffs`, kept, padded"] = count_diffusers_step(workload, False)
    rows |= {f"optimizer: {name}": count_optimizer(name) for name in OPTIMIZERS}
    return rows


def to_markdown(results: dict[str, dict[str, dict[str, int]]]) -> str:
    labels = list(results)
    names = list(dict.fromkeys(name for rows in results.values() for name in rows))
    lines = [
        "# Operations of a training step",
        "",
        "`python -m benchmarks.operations` writes this page. An operation is what torch dispatches",
        "and is not a view: on a GPU a kernel, and for a list of tensors a few. Optimizers: over",
        "the 836 factors of a LoRA of rank 16 on all linears, 65.4 M numbers. Views cost the host",
        "a microsecond or so each, and the GPU nothing. Counted on a CPU; nothing here was timed.",
        "",
        "| " + " | ".join(["", *(f"{label} | (views)" for label in labels)]) + " |",
        "|---" + "|---:" * (2 * len(labels)) + "|",
    ]
    for name in names:
        cells = []
        for label in labels:
            row = results[label].get(name)
            cells += ["-", "-"] if row is None else [f"{row[key]:,}" for key in row]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--label", default="now", help="column of the counts")
    label = parser.parse_args().label
    path = RESULTS / "operations.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[label] = measure()
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "operations.md").write_text(to_markdown(results), encoding="utf-8")
    print(to_markdown(results))


if __name__ == "__main__":
    main()

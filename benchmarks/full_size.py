"""The proof on two cores and 24 GiB: all 8.9 B parameters converted, mapped and trained for three
steps.

    python benchmarks/full_size.py --out FOLDER [--threads 2] [--keep] [--toy]

Four stages, each in a process of its own: write a random checkpoint in the hub's layout (17.8 GB),
convert it to int8 and to NF4 with the product's own converter, map the NF4 weights and take three
LoRA steps at 128 px with every block recomputed. What is finished is not done again: a killed run
goes on with the same command. About 33 GB of disk below FOLDER, given back at the end unless
--keep. Writes full_size.json and full_size.md in benchmarks/results. --toy: the same with 0.8 M
parameters in seconds; its figures are printed, and written only where --results says.

Memory is what Linux says of the process, sampled 20 times a second: anonymous pages, and pages of
mapped files, which it may take back at any time. Seconds are without Python's and torch's start.
The weights are random: the losses say that the arithmetic holds, not that anything is learnt.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.config.load import config_from_resolved
from simpletuner.config.schema import RunConfig
from simpletuner.events.event_types import Event, NoticeIssued
from simpletuner.models.chroma.model_format import WEIGHTS_STEM
from simpletuner.models.chroma.quantized_cache import quantized_transformer_file
from simpletuner.models.chroma.transformer_config import CLASS_NAME, TransformerConfig
from simpletuner.models.chroma.weights import block_linears, empty_transformer
from simpletuner.models.family import ModelFamily, ModelFiles, ModelSpec
from simpletuner.quantization.schemes import get_scheme
from simpletuner.training.world import World

if TYPE_CHECKING:
    from simpletuner.training.loop import TrainerContext
    from simpletuner.training.train_state import TrainState

RESULTS = Path(__file__).parent / "results"
SCHEMES = ("int8", "nf4")
STEPS = 3
SIZE_PX = 128
TEXT_ROWS = 32
SPARE_BYTES = 10**9
BLOCK = 2**24 + 43  # odd, so that no two rows of a matrix are the same
CHUNK = 2**21
BIAS_STD = 0.02
SAMPLE_S = 0.05
BYTES = torch.bfloat16.itemsize
Figures = dict[str, Any]
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Size:
    """shard_bytes: no file of the checkpoint is larger."""

    name: str
    config: TransformerConfig
    shard_bytes: int


FULL = Size("full_size", TransformerConfig(), 5 * 10**9)
TOY = Size(
    "full_size-toy",
    TransformerConfig(
        num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, axes_dims_rope=(4, 14, 14), approximator_hidden_dim=64, approximator_layers=2,
    ),
    10**6,
)  # fmt: skip


def resident() -> dict[str, int]:
    """Bytes of this process: anonymous, file-backed, and the kernel's own record of the most of
    both.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    entries = dict(line.split(":", 1) for line in lines)
    kib = {
        name: int(entries[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem", "VmHWM")
    }
    parts = {
        "anonymous": kib["RssAnon"] + kib["RssShmem"],
        "file": kib["RssFile"],
        "most": kib["VmHWM"],
    }
    return {name: size * 1024 for name, size in parts.items()}


@contextmanager
def measured() -> Iterator[Figures]:
    """Filled at the end: seconds, CPU seconds of all threads, and peaks in GB (10^9 bytes)."""
    found: Figures = {}
    peak = {"anonymous": 0, "file": 0}
    over = threading.Event()

    def sample() -> None:
        now = resident()
        for part in peak:
            peak[part] = max(peak[part], now[part])

    def keep_sampling() -> None:
        while not over.wait(SAMPLE_S):
            sample()

    sampler = threading.Thread(target=keep_sampling, daemon=True)
    sample()
    sampler.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield found
    finally:
        spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        over.set()
        sampler.join()
        sample()
    found |= {name: round(seconds, 2) for name, seconds in spent.items()}
    found |= {f"peak_{part}_gb": gb(size) for part, size in peak.items()}
    found |= {"peak_resident_gb": gb(resident()["most"])}


def gb(size: float) -> float:
    return round(size / 1e9, 3)


def write(folder: Path, size: Size) -> Figures:
    """Each tensor from one block of random numbers, begun elsewhere, scaled and written in pieces."""
    transformer = empty_transformer(size.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    target = folder / "transformer"
    target.mkdir(parents=True, exist_ok=True)
    require_room(
        target, needed_bytes(shapes, {f"{name}.weight" for name in block_linears(transformer)})
    )
    with measured() as found:
        block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
        shards = split(shapes, size.shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = target / f"{WEIGHTS_STEM}-{number:05}-of-{len(shards):05}.safetensors"
            if not file.exists():
                write_shard(file, {name: shapes[name] for name in names}, block)
                print(f"{file.name} is written", flush=True)
            weight_map |= dict.fromkeys(names, file.name)
        count = sum(map(math.prod, shapes.values()))
        index = {"metadata": {"total_size": count * BYTES}, "weight_map": weight_map}
        (target / f"{WEIGHTS_STEM}.safetensors.index.json").write_text(
            json.dumps(index, indent=1), encoding="utf-8"
        )
        fields = {"_class_name": CLASS_NAME, **size.config.__dict__}
        (target / "config.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    return {"parameters": count, "tensors": len(shapes), "gb": gb(count * BYTES), **found}


def needed_bytes(shapes: Shapes, quantized: set[str]) -> int:
    """The checkpoint and both of its conversions."""
    whole = sum(map(math.prod, shapes.values())) * BYTES
    linears = [(shapes[name][0], shapes[name][1]) for name in quantized]
    rest = whole - sum(map(math.prod, linears)) * BYTES
    return whole + sum(
        rest + sum(get_scheme(one).size_bytes(*shape) for shape in linears) for one in SCHEMES
    )


def require_room(folder: Path, needed: int) -> None:
    """Counting what an earlier, killed run left there."""
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    missing = needed + SPARE_BYTES - there
    if free < missing:
        raise SystemExit(
            f"{folder} has room for {gb(free)} GB, {gb(missing)} GB are needed: another --out"
        )


def split(shapes: Shapes, shard_bytes: int) -> list[list[str]]:
    """Names by file, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES
        if shards[-1] and filled + size > shard_bytes:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shard(file: Path, shapes: Shapes, block: Tensor) -> None:
    """Under another name until it is whole."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * BYTES
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for name, shape in shapes.items():
            for piece in pieces(name, shape, block):
                out.write(piece.view(torch.uint8).numpy().data)
    os.replace(partial, file)


def pieces(name: str, shape: Sequence[int], block: Tensor) -> Iterator[Tensor]:
    """Norms are 1, biases small; a matrix keeps the size of what it is multiplied with."""
    norm = len(shape) == 1 and name.endswith(".weight")
    std = BIAS_STD if len(shape) == 1 else shape[-1] ** -0.5
    at = zlib.crc32(name.encode()) % BLOCK
    left = math.prod(shape)
    while left:
        taken = block[at : at + min(left, CHUNK)]
        yield torch.ones_like(taken) if norm else taken * std
        left -= len(taken)
        at = (at + len(taken)) % BLOCK


def converter(scheme: str) -> Callable[[Path, Size], Figures]:
    def convert(folder: Path, size: Size) -> Figures:
        source, run = source_of(folder), run_of(folder, scheme)
        notes: list[str] = []

        def tell(event: Event) -> None:
            if isinstance(
                event, NoticeIssued
            ):  # that a killed conversion went on: the figures are of the rest
                notes.append(f"{event.message}: the figures are of the rest.")

        with measured() as found:
            file = quantized_transformer_file(source, run.model, torch.device("cpu"), tell)
        return {"gb": gb(file.stat().st_size), **found, "notes": notes}

    return convert


def source_of(folder: Path) -> ModelFiles:
    """Only the transformer is there, and nothing else is read."""
    transformer = folder / "transformer"
    return ModelFiles("a random checkpoint", "", transformer, transformer, transformer, transformer)


def run_of(folder: Path, scheme: str) -> RunConfig:
    return config_from_resolved({
        "base_model_precision": scheme, "quantized_cache_dir": str(folder / "quantized"), "lora_rank": 16,
        "flux_lora_target": "all+ffs", "gradient_checkpointing": True, "mixed_precision": "bf16",
        "device": "cpu", "seed": 1, "max_train_steps": STEPS,
    })  # fmt: skip


def train(folder: Path, size: Size) -> Figures:
    """Mapped from a cold disk, then the loop's own steps."""
    # Here, so that the conversions' memory is not that of libraries which they do not use.
    from simpletuner.events.sinks import null_emit
    from simpletuner.models import registry
    from simpletuner.training import loop, train_state
    from simpletuner.training.device import select_device

    for file in (folder / "quantized").iterdir():
        forget(file)
    source, run, family = source_of(folder), run_of(folder, "nf4"), registry.get_family("chroma")
    device, steps = select_device(run.model), []
    with measured() as whole:
        with measured() as loading:
            transformer = family.load_transformer(
                source, device.device, device.weights_dtype, run.model, null_emit
            )
        trained = train_state.attach_trainable_parameters(run, family, transformer, null_emit)
        train_state.configure_blocks(run, family, transformer, device.device)
        net = train_state.assemble_train_state(
            run,
            transformer,
            trained,
            train_state.make_sharding(run, World()),
            run.training.gradient_accumulation_steps,
        )
        parts = parts_of(run, family, net, size.config)
        for step in range(STEPS):
            started = time.process_time()
            done = loop.train_step(parts, step)
            spent = {
                "wall_s": round(done.seconds, 2),
                "cpu_s": round(time.process_time() - started, 2),
            }
            steps.append(
                {"step": done.step, "loss": done.loss, "grad_norm": done.grad_norm, **spent}
            )
            print(json.dumps(steps[-1]), flush=True)
    count = sum(parameter.numel() for parameter in trained.values())
    return {"load": loading, "trained_parameters": count, "steps": steps, **whole}


def forget(file: Path) -> None:
    """Its pages leave the kernel's cache."""
    with file.open("rb") as opened:
        os.fsync(opened)
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parts_of(
    run: RunConfig, family: ModelFamily, net: TrainState, config: TransformerConfig
) -> TrainerContext:
    """As the memory plan builds them, with random numbers where it has shapes alone."""
    from simpletuner.cache.batch_types import Batch
    from simpletuner.models.chroma.fingerprints import T5_TENSOR
    from simpletuner.models.chroma.model_spec import CHROMA_CONSTANTS
    from simpletuner.models.family import TextTensor
    from simpletuner.training.loop import TrainSchedule
    from simpletuner.training.memory_plan import fake_step
    from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode

    facts = replace(
        CHROMA_CONSTANTS, text_tensors={T5_TENSOR: TextTensor(config.joint_attention_dim)}
    )
    heads = config.num_attention_heads
    sketch = ModelSpec(
        net.transformer, (), config.width, heads, facts, False, torch.bfloat16, 0, 0, 0, 0
    )
    feed = fake_step.BatchShape(samples=1, size_px=(SIZE_PX, SIZE_PX), text_rows=TEXT_ROWS)
    parts = fake_step.make_fake_context(
        run, family, sketch, feed, net, TrainSchedule(STEPS, 1, 1, 0), MemoryTrackerMode(1)
    )
    shaped = parts.load_batch

    def batch(number: int) -> Batch:
        made, random = shaped(number), torch.Generator().manual_seed(number)
        for tensor in (made.latents, *made.text.tensors.values()):
            tensor.normal_(generator=random)
        return made

    return replace(parts, load_batch=batch)


STAGES: Mapping[str, Callable[[Path, Size], Figures]] = {
    "write": write, **{scheme: converter(scheme) for scheme in SCHEMES}, "train": train,
}  # fmt: skip


def finished(folder: Path, stage: str) -> Path:
    return folder / "finished" / f"{stage}.json"


def do(stage: str, folder: Path, size: Size) -> None:
    """One stage in this process, remembered when it is over."""
    figures = STAGES[stage](folder, size)
    file = finished(folder, stage)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    os.replace(partial, file)


def collect(folder: Path, threads: int) -> Figures:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = {"cores": len(os.sched_getaffinity(0)), "memory_gb": gb(memory), "threads": threads,
               "torch": torch.__version__}  # fmt: skip
    stages = {
        stage: json.loads(finished(folder, stage).read_text(encoding="utf-8")) for stage in STAGES
    }
    return {"machine": machine, "px": SIZE_PX, "text_rows": TEXT_ROWS, **stages}


def markdown(result: Figures) -> str:
    machine, written, trained = result["machine"], result["write"], result["train"]
    told = {
        f"write {written['parameters']:,} parameters, {written['gb']} GB": written,
        **{f"convert to {scheme}, {result[scheme]['gb']} GB": result[scheme] for scheme in SCHEMES},
        "map the nf4 weights, disk cold": trained["load"],
        f"map them and take {STEPS} LoRA steps": trained,
    }
    peaks = ("peak_resident_gb", "peak_anonymous_gb", "peak_file_gb")
    rows = [
        (what, *(one[name] for name in ("wall_s", "cpu_s", *peaks))) for what, one in told.items()
    ]
    steps = [(one["step"], f"{one['loss']:.4f}", f"{one['grad_norm']:.4f}", one["wall_s"], one["cpu_s"])
             for one in trained["steps"]]  # fmt: skip
    return "\n".join([
        f"`python benchmarks/full_size.py`: {machine['cores']} cores, {machine['memory_gb']} GB of memory,"
        f" {machine['threads']} threads, torch {machine['torch']}.",
        "",
        *table(("stage", "s", "CPU s", "peak resident (GB)", "anonymous (GB)", "of files (GB)"), rows),
        *(f"\n{note}" for stage in STAGES for note in result[stage].get("notes", [])),
        "",
        f"Rank-16 LoRA on all linears of the blocks ({trained['trained_parameters'] / 1e6:.1f} M parameters),"
        f" {result['px']} px, {result['text_rows']} text rows, all blocks recomputed:",
        "",
        *table(("step", "loss", "gradient norm", "s", "CPU s"), steps),
        "",
    ])  # fmt: skip


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (heads, ["---"] * len(heads), *rows)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    size = TOY if chosen.toy else FULL
    folder = chosen.out.resolve() / size.name
    if chosen.stage:
        torch.set_num_threads(chosen.threads)
        do(chosen.stage, folder, size)
        return
    shared = [
        f"--out={chosen.out}",
        f"--threads={chosen.threads}",
        *(["--toy"] if chosen.toy else []),
    ]
    for stage in STAGES:
        there = finished(folder, stage).exists()
        print(f"{stage}: done before" if there else f"{stage} ...", flush=True)
        if not there:
            subprocess.run([sys.executable, __file__, *shared, "--stage", stage], check=True)
    result = collect(folder, chosen.threads)
    results = chosen.results or (None if chosen.toy else RESULTS)
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{size.name}.json").write_text(
            json.dumps(result, indent=1) + "\n", encoding="utf-8"
        )
        (results / f"{size.name}.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    if not chosen.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

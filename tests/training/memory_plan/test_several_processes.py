"""The plan of a run with several processes: what each holds, what they send, which mode fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from simpletuner.cli.plan import command
from simpletuner.config.load import resolved_options
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.models.family import BlockMemoryPolicy
from simpletuner.training.memory_plan import memory_saving, plan_formatting, preflight, world_layout
from simpletuner.training.memory_plan.communication import step_communication
from simpletuner.training.memory_plan.fake_step import StepMeasurement
from simpletuner.training.memory_plan.fit import MemoryConfigSearch, find_fitting_mode, with_options
from simpletuner.training.memory_plan.machine_resources import MachineResources
from simpletuner.training.memory_plan.prediction import MemoryPrediction, predict_memory
from simpletuner.training.memory_plan.world_layout import (
    SHARDED_STATE,
    WeightBytes,
    WorldLayout,
    offloaded_by_engine,
    parts_per_process,
    read_layout,
)
from tests.training.memory_plan.tiny_family import TinyChroma, make_run_config

SIZE = (ResizeCropConfig(resolution=256),)
CARD = MachineResources("a card", "cuda", 1e13)
FULL = {"model_type": "full", "optimizer": "adamw"}
WEIGHTS = WeightBytes((40, 120, 80, 100, 60, 200), 60)
# One measured training of a model with WEIGHTS: at full rank, and of an adapter.
FULL_STEP = StepMeasurement(
    {}, 1.0, 330, 660, 1320, trained_tensors=[600, 60], activations=70, trained_units=5
)
LORA_STEP = StepMeasurement({}, 1.0, 10, 40, 80, trained_tensors=[24, 16], activations=70)
PARTS = {"weights": 660, "adapters": 0, "optimizer": 1320, "activations": 5, "temporaries": 700}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def zero(stage: int, **section: Any) -> dict[str, Any]:
    return {"deepspeed_config": {"zero_optimization": {"stage": stage, **section}}}


def plan(processes: int, **options: Any) -> MemoryPrediction:
    run = make_run_config(num_processes=processes, **options)
    return predict_memory(run, TinyChroma(), SIZE, "cuda")


def layout(mode: str, processes: int, **fields: Any) -> WorldLayout:
    sharded = SHARDED_STATE[mode]
    return WorldLayout(processes, processes, mode, sharded, **fields)


@pytest.mark.parametrize(
    ("options", "mode", "sharded"),
    [
        ({}, "replicated", ()),
        (zero(0), "replicated", ()),
        ({"fsdp_enable": True}, "sharded", ("optimizer", "gradients", "weights")),
        (zero(1), "zero1", ("optimizer",)),
        (zero(2), "zero2", ("optimizer", "gradients")),
        (zero(3), "zero3", ("optimizer", "gradients", "weights")),
        ({**zero(3), "base_model_precision": "int8"}, "zero3", ("optimizer", "gradients")),
    ],
)
def test_the_mode_follows_the_options(
    options: dict[str, Any], mode: str, sharded: tuple[str, ...]
) -> None:
    found = read_layout(make_run_config(num_processes=4, **options))
    assert (found.processes, found.local, found.mode, found.sharded) == (4, 4, mode, sharded)


def test_machines_and_automatic_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = {"num_machines": 2, "main_process_ip": "10.0.0.1"}
    run = make_run_config(num_processes=8, **machines)
    assert (read_layout(run).processes, read_layout(run).local) == (8, 4)
    monkeypatch.setattr(world_layout.torch.cuda, "device_count", lambda: 3)
    auto = make_run_config(num_processes="auto", **machines, device="auto")
    assert (read_layout(auto).processes, read_layout(auto).local) == (6, 3)
    assert read_layout(make_run_config(num_processes="auto")).processes == 1, "on a CPU"
    for name, value in {"RANK": 3, "WORLD_SIZE": 5, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    found = read_layout(make_run_config())
    assert (found.processes, found.local) == (5, 2), "a launcher has decided"


def test_weights_of_each_process() -> None:
    assert WEIGHTS.per_process(layout("replicated", 4)) == 660
    assert WEIGHTS.per_process(layout("sharded", 1)) == 660
    assert WEIGHTS.per_process(layout("sharded", 4)) == 165 + 120 + 200 + 60
    assert WEIGHTS.per_process(layout("sharded", 4, reshards=False)) == 165 + 660
    assert WEIGHTS.per_process(layout("zero3", 12, live_bytes=400)) == 55 + 400
    assert WEIGHTS.per_process(layout("zero3", 12, live_bytes=600)) == 55 + 600
    assert WEIGHTS.per_process(layout("zero3", 12, live_bytes=9999)) == 55 + 660


@pytest.mark.parametrize(
    ("mode", "changed"),
    [
        ("replicated", {}),
        ("sharded", {"weights": 165 + 320 + 60, "optimizer": 330, "activations": 70,
                     "temporaries": 700 - 495 + 200}),
        ("zero1", {"optimizer": 2 * 330 + 330, "communication buffers": 50}),
        ("zero2", {"optimizer": 2 * 330 + 330, "communication buffers": 50, "activations": 70,
                   "temporaries": 700 - 495 + 200}),
        ("zero3", {"weights": 165 + 320 + 60, "optimizer": 2 * 330 + 330, "communication buffers": 50,
                   "activations": 70, "temporaries": 700 - 495 + 200}),
    ],
)  # fmt: skip
def test_parts_at_full_rank(mode: str, changed: dict[str, int]) -> None:
    world = layout(mode, 4, bucket_bytes=50)
    found = parts_per_process(PARTS, world, WEIGHTS, FULL_STEP, is_lora=False)
    assert found == {**PARTS, **changed}
    alone = parts_per_process(PARTS, layout(mode, 1), WEIGHTS, FULL_STEP, is_lora=False)
    assert alone == PARTS


def test_adapters_stay_whole_unless_the_engine_shards_them() -> None:
    parts = {"weights": 660, "adapters": 40, "optimizer": 80, "activations": 70, "temporaries": 90}
    found = parts_per_process(parts, layout("sharded", 4), WEIGHTS, LORA_STEP, is_lora=True)
    assert found == {**parts, "weights": 545}
    world = layout("zero3", 4, bucket_bytes=500)
    found = parts_per_process(parts, world, WEIGHTS, LORA_STEP, is_lora=True)
    assert found == {
        "weights": 545, "adapters": 10, "optimizer": 30, "activations": 70, "temporaries": 60,
        "communication buffers": 40,
    }  # fmt: skip


def test_what_the_engine_offloads_is_counted_on_the_host() -> None:
    options = zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    world = read_layout(make_run_config(num_processes=4, **options))
    moved = offloaded_by_engine(PARTS, world, WEIGHTS)
    assert moved == {"optimizer": 1320, "weights": 165}
    assert offloaded_by_engine(PARTS, layout("zero3", 4), WEIGHTS) == {}
    here, there = plan(4, **FULL, **zero(3)), plan(4, **FULL, **options)
    assert there.parts["optimizer"] == 0
    assert there.host["optimizer"] == 4 * here.parts["optimizer"], "of all four processes"
    assert there.parts["weights"] < here.parts["weights"]


def operations(
    world: WorldLayout, passes: int, is_lora: bool, step: StepMeasurement
) -> dict[str, Any]:
    uses = step_communication(world, WEIGHTS, step, passes, is_lora)
    return {use.operation: (use.calls, use.message_bytes, use.sent_bytes) for use in uses}


@pytest.mark.parametrize(
    ("processes", "passes", "senders", "most"),
    [(2, 1, 1, 1), (4, 1, 3, 1), (3, 1, 2, 1), (2, 2, 1, 1), (2, 3, 2, 2), (8, 1, 7, 1)],
)
def test_gradients_of_adapters_go_up_the_tree(
    processes: int, passes: int, senders: int, most: int
) -> None:
    """Three passes of two processes: the tree takes four and two, so the second one sends twice."""
    message = 40 + 2  # and one byte for each of the two parameters
    found = operations(layout("replicated", processes), passes, True, LORA_STEP)
    assert found == {
        "send": (2 * senders, senders * message, most * message),
        "broadcast": (2, message, message),
    }


@pytest.mark.parametrize(
    ("mode", "fields", "expected"),
    [
        ("replicated", {}, {"all_reduce": (1, 660, 990)}),
        ("sharded", {}, {"all_gather": (26, 2520, 1890), "reduce_scatter": (10, 1320, 990)}),
        ("sharded", {"reshards": False},
         {"all_gather": (14, 1320, 990), "reduce_scatter": (10, 1320, 990)}),
        ("zero1", {}, {"all_reduce": (1, 660, 990), "all_gather": (1, 660, 495)}),
        ("zero2", {}, {"all_reduce": (2, 1320, 1980), "all_gather": (1, 660, 495)}),
        ("zero3", {}, {"all_gather": (None, 2520, 1890), "reduce_scatter": (2, 1320, 990)}),
        ("zero3", {"live_bytes": 660},
         {"all_gather": (None, 1320, 990), "reduce_scatter": (2, 1320, 990)}),
    ],
)  # fmt: skip
def test_communication_of_two_passes_at_full_rank(
    mode: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert operations(layout(mode, 4, **fields), 2, False, FULL_STEP) == expected


def test_gradients_that_are_widened_have_twice_the_bytes() -> None:
    narrow, wide = (
        layout("zero2", 4, bucket_bytes=50, widens_gradients=on) for on in (False, True)
    )
    before, after = (
        parts_per_process(PARTS, world, WEIGHTS, FULL_STEP, is_lora=False)
        for world in (narrow, wide)
    )
    assert after["temporaries"] == before["temporaries"] + 165
    assert after["communication buffers"] == 50 + 100
    # Two tensors that are larger than a bucket of 50 bytes; 660 bytes are gathered by 13 calls.
    assert operations(wide, 2, False, FULL_STEP) == {
        "all_reduce": (4, 2640, 3960),
        "all_gather": (13, 660, 495),
    }
    larger = layout("zero2", 4, bucket_bytes=1000)
    assert operations(larger, 1, False, FULL_STEP)["all_gather"] == (1, 660, 495)
    for stage, options, widens in ((2, FULL, True), (1, FULL, False), (2, {}, False)):
        run = make_run_config(num_processes=4, **options, **zero(stage))
        assert read_layout(run).widens_gradients == widens


def test_vectors_stay_whole() -> None:
    weights = WeightBytes((100, 100, 100), 60, whole=7)
    assert weights.own_part(layout("sharded", 4)) == 90 + 7
    assert weights.per_process(layout("sharded", 4)) == 90 + 7 + 200 + 60
    assert weights.per_process(layout("replicated", 4)) == 367


def test_nothing_is_sent_by_one_process() -> None:
    for mode in SHARDED_STATE:
        assert operations(layout(mode, 1), 2, False, FULL_STEP) == {}


def test_shards_and_adapters_are_both_sent() -> None:
    found = operations(layout("sharded", 2), 1, True, LORA_STEP)
    assert found == {"all_gather": (13, 1260, 630), "send": (2, 42, 42), "broadcast": (2, 42, 42)}
    found = operations(layout("zero3", 2), 1, True, LORA_STEP)
    assert found == {"all_gather": (None, 1340, 670), "reduce_scatter": (1, 40, 20)}


def test_a_whole_plan_of_several_processes() -> None:
    one, two = plan(1), plan(2)
    assert two.parts == one.parts, "a whole copy in each"
    assert two.host == {use: 2 * size for use, size in one.host.items()}
    assert (one.communication, one.base_bytes) == ((), two.base_bytes)
    sharded = [plan(count, fsdp_enable=True) for count in (2, 4, 8)]
    whole = one.base_bytes - 2 * (one.base_bytes - sharded[0].base_bytes)
    assert 0 < whole < 0.02 * one.base_bytes, "vectors"
    for count, found in zip((2, 4, 8), sharded, strict=True):
        assert found.base_bytes == whole + -(-(one.base_bytes - whole) // count)
    gathered = [found.parts["weights"] - found.base_bytes for found in sharded]
    assert gathered[0] < one.base_bytes
    assert gathered == [gathered[0]] * 3, "two blocks, whatever the number of processes"
    assert {use.operation for use in sharded[0].communication} == {
        "all_gather",
        "send",
        "broadcast",
    }


def test_fit_shards_where_copies_need_swapped_blocks() -> None:
    run = make_run_config(num_processes=8, device="cuda")
    search = MemoryConfigSearch(run, TinyChroma(), SIZE, CARD, fixed_precisions=True)
    replicated = search.lowest_memory_config().size
    roomy, best = find_fitting_mode(search, 10**12)
    assert best.chosen is not None
    assert (roomy, best.chosen.shards) == (search, False)
    without_swap = BlockMemoryPolicy(search.blocks, 1, 0, True, True)
    tight = search.estimate_config("no_change", without_swap).size - 1
    assert replicated < tight, "swapping would fit"
    other, best = find_fitting_mode(search, tight)
    assert best.chosen is not None
    assert best.chosen.exact
    assert best.chosen.size <= tight
    assert best.chosen.options()["fsdp_enable"] is True
    assert "--fsdp_enable=true" in plan_formatting.format_flags(run, best.chosen)
    assert with_options(run, best.chosen.options()).distributed.fsdp_enable
    assert other.offloadable_precisions == [], "shards cannot be swapped"
    alone = MemoryConfigSearch(
        make_run_config(device="cuda"), TinyChroma(), SIZE, CARD, fixed_precisions=True
    )
    _, best = find_fitting_mode(alone, tight)
    assert best.chosen is not None
    assert best.chosen.memory.swapped, "one process has nobody to share with"


def test_the_processes_of_a_cpu_share_its_memory() -> None:
    cpu = MachineResources("a CPU", "cpu", 1e12, 8000, 8000)
    assert cpu.for_process(4) == dataclasses.replace(cpu, device_free_bytes=2000)
    card = dataclasses.replace(cpu, kind="cuda")
    assert card.for_process(4) == card
    assert CARD.for_process(4) == CARD


def test_a_person_reads_the_mode_and_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(2, fsdp_enable=True)
    lines = plan_formatting.format_plan(found, CARD)
    text = "\n".join(lines)
    assert "2 processes, sharded by FSDP2; " in text
    assert "GPU memory of each process while training" in text
    assert "host memory of 2 processes" in text
    assert "sent by each process in a step" in text
    assert "  all_gather, 11 calls" in text
    summary = plan_formatting.format_summary(found, CARD)
    assert summary.startswith("plan: 2 processes, sharded by FSDP2, each: GPU memory ")
    assert "each process sends" in summary
    alone = plan(1)
    text = plan_formatting.format_summary(alone, CARD) + str(
        plan_formatting.format_plan(alone, CARD)
    )
    assert "process" not in text


def test_the_next_setting_of_several_processes_is_to_shard() -> None:
    def suggested(**options: Any) -> list[dict[str, Any]]:
        return list(memory_saving.memory_saving_options(make_run_config(**options)))

    assert {"fsdp_enable": True} in suggested(num_processes=2)
    assert {"fsdp_enable": True} not in suggested()
    assert {"fsdp_enable": True} not in suggested(num_processes=2, musubi_blocks_to_swap=1)
    assert {"fsdp_enable": True} not in suggested(num_processes=2, fsdp_enable=True)
    assert {"fsdp_enable": True} not in suggested(num_processes=2, **zero(2))


def test_train_fits_a_mode_too() -> None:
    run = make_run_config(num_processes=8)
    search = MemoryConfigSearch(run, TinyChroma(), SIZE, CARD)
    without_swap = BlockMemoryPolicy(search.blocks, 1, 0, True, True)
    limit = search.estimate_config("no_change", without_swap).size - 1
    room = MachineResources("a card", "cuda", 1e13, limit, 10**12)
    events: list[Any] = []
    fitted = preflight.fit_run(
        run, TinyChroma(), SIZE, room, "", resolved_options(run), events.append
    )
    assert fitted.distributed.fsdp_enable
    assert resolved_options(fitted)["num_processes"] == 8


def test_the_command_prints_the_processes() -> None:
    flags = ["--example", "chroma-nano.peft-lora", "--num_processes", "2", "--device", "cuda"]
    done = CliRunner().invoke(command, [*flags, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["world"]["processes"], found["world"]["mode"]) == (2, "replicated")
    assert found["sent_bytes"] == sum(use["sent_bytes"] for use in found["communication"]) > 0

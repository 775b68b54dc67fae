"""From measured bytes to what a run needs; what is remembered; which way fits; what a person reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from simpletuner.cli.plan import command
from simpletuner.config.evaluation_models import DEFAULT_MODEL_BYTES
from simpletuner.config.load import resolved_options
from simpletuner.config.option_catalog import all_options
from simpletuner.config.option_values import parse_memory_size
from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.errors import ConfigError
from simpletuner.events.event_types import Event, NoticeIssued
from simpletuner.models.block_executor import block_memory_policy
from simpletuner.models.encoders import EncoderPass
from simpletuner.models.family import BlockMemoryPolicy
from simpletuner.training.memory_plan import (
    fake_encoders,
    fake_step,
    fit,
    machine_resources,
    memory_saving,
    plan_cache,
    plan_formatting,
    prediction,
    preflight,
)
from simpletuner.training.memory_plan.checkpointing_choice import choose_checkpointing
from simpletuner.training.memory_plan.fake_step import BatchShape, StepMeasurement
from simpletuner.training.memory_plan.fit import MemoryConfigSearch
from simpletuner.training.memory_plan.host_memory import HOST_RUNTIME_BYTES
from simpletuner.training.memory_plan.machine_resources import MachineResources, find_disk_shortages
from simpletuner.training.memory_plan.prediction import predict_memory
from tests.models.tiny_evaluation_models import make_clip
from tests.training.memory_plan.tiny_family import (
    BATCH_SHAPE,
    CONFIG,
    TinyChroma,
    make_model_spec,
    make_run_config,
)

BLOCKS = CONFIG.num_layers + CONFIG.num_single_layers
SIZE = (ResizeCropConfig(resolution=256),)
CARD = MachineResources("a card", "cuda", 1e13)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_second_answer_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = predict_memory(make_run_config(), TinyChroma(), SIZE)

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(fake_step, "measure_fake_step", never)
    assert predict_memory(make_run_config(learning_rate=0.5, seed=7), TinyChroma(), SIZE) == first
    with pytest.raises(AssertionError, match="again"):
        predict_memory(make_run_config(lora_rank=8), TinyChroma(), SIZE)


@pytest.mark.parametrize(
    "other",
    [{"lora_rank": 5}, {"optimizer": "lion"}, {"base_model_precision": "nf4"}, {"mixed_precision": "no"},
     {"gradient_accumulation_steps": 2}, {"use_dora": True}],
)  # fmt: skip
def test_what_moves_bytes_is_another_key(other: dict[str, object]) -> None:
    def key(
        run: RunConfig,
        feed: BatchShape = BATCH_SHAPE,
        memory: BlockMemoryPolicy = BlockMemoryPolicy(),  # noqa: B008
    ) -> str:
        return plan_cache.cache_key(run, make_model_spec(run), memory, feed, 1)

    run = make_run_config(**other)
    assert key(run) != key(make_run_config())
    assert key(run) != key(run, dataclasses.replace(BATCH_SHAPE, samples=3))
    assert key(run) != key(run, memory=BlockMemoryPolicy(1))


def test_options_that_declare_no_effect_on_the_plan_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them are changed at once, and the step is measured a second time."""
    texts = {
        "flow_custom_timesteps": "0.5",
        "validation_strengths": "0.25",
        "hub_model_id": "me/mine",
    }
    changes: dict[str, object] = {}
    for option in all_options().values():
        if option.affects or (option.kind == "text" and option.name not in texts):
            continue
        others = [word for word in option.choices if word != option.default]
        changes[option.name] = {
            "flag": not option.default,
            "choice": others[0] if others else option.default,
            "integer": int(option.default or 1) + 1 if option.kind == "integer" else None,
            "number": 0.25,
            "text": texts.get(option.name),
        }[option.kind]
    changes |= {
        "validation_guidance_real": 2.0,
        "validation_prompt_library": False,
        "lora_alpha": 8.0,
    }
    assert len(changes) > 50
    plain = predict_memory(make_run_config(), TinyChroma(), SIZE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert predict_memory(make_run_config(**changes), TinyChroma(), SIZE) == plain


def test_what_waits_on_the_host_is_taken_from_the_device() -> None:
    """All blocks swapped: two rooms of the largest block instead of all blocks."""
    run, family = make_run_config(), TinyChroma()
    here = predict_memory(run, family, SIZE, "cuda", BlockMemoryPolicy(BLOCKS))
    swapped = predict_memory(
        run, family, SIZE, "cuda", BlockMemoryPolicy(BLOCKS, 1, BLOCKS, True, True)
    )
    sizes = [
        sum(parameter.nbytes for parameter in block.parameters())
        for block in make_model_spec(run).blocks
    ]
    less = here.parts["weights"] - swapped.parts["weights"]
    assert less == pytest.approx(sum(sizes) - 2 * max(sizes) + 1_000_000, rel=0.01)
    rows = (256 // 16) ** 2 + 512
    assert here.parts["activations"] - swapped.parts["activations"] == (BLOCKS - 2) * rows * 256 * 2
    assert swapped.host["inputs"] == (BLOCKS - 2) * 2**19  # torch locks powers of two
    assert swapped.host["swapped blocks"] == pytest.approx(here.parts["weights"], rel=0.01)
    assert swapped.moved == pytest.approx(2 * sum(sizes), rel=0.01)


def test_an_average_is_where_it_is_kept() -> None:
    plain, on_host, beside = (
        predict_memory(make_run_config(**options), TinyChroma(), SIZE, "cuda")
        for options in ({}, {"use_ema": True, "ema_device": "cpu"}, {"use_ema": True})
    )
    assert on_host.parts == plain.parts
    assert on_host.host["average"] == 4 * plain.trained
    assert beside.parts["optimizer"] - plain.parts["optimizer"] == 4 * plain.trained


def test_the_largest_set_decides() -> None:
    sketch = make_model_spec(make_run_config())
    framings = (
        ResizeCropConfig(resolution=512),
        ResizeCropConfig(resolution=1.0, resolution_type="area"),
    )
    assert prediction.largest_batch_shape(make_run_config(), framings, sketch) == BatchShape(
        1, (1024, 1024), 512
    )
    own_size = (ResizeCropConfig(resolution=512, train_batch_size=5), *framings)
    assert prediction.largest_batch_shape(make_run_config(), own_size, sketch) == BatchShape(
        5, (512, 512), 512
    )
    listed = (
        ResizeCropConfig(
            crop=True, crop_aspect="closest", resolution_buckets=((64, 64), (640, 960))
        ),
    )
    assert prediction.largest_batch_shape(make_run_config(), listed, sketch).size_px == (640, 960)
    wide = (ResizeCropConfig(resolution=512, resolution_type="pixel"),)
    assert prediction.largest_batch_shape(
        make_run_config(tokenizer_max_length=77), wide, sketch
    ) == BatchShape(1, (768, 512), 77)


def test_the_chosen_way_fits_and_a_tighter_limit_is_slower() -> None:
    run = make_run_config(device="auto")
    ladder = MemoryConfigSearch(run, TinyChroma(), SIZE, CARD)
    kept, recomputed = (
        ladder.uncheckpointed_prediction.training,
        ladder.checkpointed_prediction.training,
    )
    assert recomputed < kept
    loose = fit.find_fitting_config(ladder, kept)
    assert loose.chosen is not None
    assert (loose.chosen.precision, loose.chosen.memory.checkpointed) == ("no_change", 0)
    between = fit.find_fitting_config(ladder, (kept + recomputed) // 2)
    assert between.chosen is not None
    assert between.chosen.exact
    assert between.chosen.size <= (kept + recomputed) // 2
    assert between.chosen.seconds >= loose.chosen.seconds
    nothing = fit.find_fitting_config(ladder, 1000)
    assert nothing.chosen is None
    assert "nothing fits" in plan_formatting.format_fit(run, nothing)[0]
    least = ladder.lowest_memory_config()
    assert (least.precision, least.memory) == (
        "nf4",
        BlockMemoryPolicy(BLOCKS, 1, BLOCKS, True, True),
    )
    lines = preflight.smaller_training_message(ladder, 1000).splitlines()
    assert f"--musubi_blocks_to_swap={BLOCKS}" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == [
        "optimizer",
        "resolution",
    ]  # the rank is 4 already


def test_a_training_that_cannot_fit_is_refused_with_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, family = make_run_config(gradient_checkpointing=False), TinyChroma()
    plan = predict_memory(run, family, SIZE)
    limit = predict_memory(run, family, SIZE, memory=BlockMemoryPolicy(BLOCKS)).tensor_bytes + 1_000
    monkeypatch.setattr(preflight.registry, "get_family", lambda name: family)
    total = limit + HOST_RUNTIME_BYTES["cpu"]
    monkeypatch.setattr(
        preflight,
        "detect_budget",
        lambda device: MachineResources("a card", "cpu", 1e13, total, 10**12),
    )
    assert plan.tensor_bytes > limit
    with pytest.raises(ConfigError, match=r"needs .* and a card has") as refused:
        preflight.preflight_check(run, SIZE, lambda event: None)
    assert refused.value.exit_code == 2
    assert "--base_model_precision=" in str(refused.value)


def test_at_full_rank_a_lora_is_tried_before_a_smaller_picture() -> None:
    changes = list(
        memory_saving.memory_saving_options(
            make_run_config(model_type="full", optimizer="adamw_bf16")
        )
    )
    assert changes[-2:] == [{"model_type": "lora"}, {"resolution": 768.0}]


def fitted(
    run: RunConfig, free: int, monkeypatch: pytest.MonkeyPatch, within: str = "",
    before: dict[str, object] | None = None,
) -> tuple[RunConfig, list[str]]:  # fmt: skip
    told = list[Event]()
    room = MachineResources("a card", "cpu", 1e13, free + HOST_RUNTIME_BYTES["cpu"], 10**12)
    monkeypatch.setattr(preflight.registry, "get_family", lambda name: TinyChroma())
    monkeypatch.setattr(preflight, "detect_budget", lambda device: room)
    run = preflight.preflight_check(run, SIZE, told.append, within, before)
    said = [event.message for event in told if isinstance(event, NoticeIssued)]
    return run, [message for message in said if not message.startswith("measuring a step")]


def test_a_training_takes_the_fastest_way_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bits without recomputing are quicker than recomputing; what is said is what is set."""
    run = make_run_config(gradient_checkpointing=True)
    kept = predict_memory(run, TinyChroma(), SIZE, memory=BlockMemoryPolicy())
    roomy, said = fitted(run, kept.training, monkeypatch)
    assert (roomy.model.base_model_precision, roomy.model.gradient_checkpointing) == (
        "no_change",
        False,
    )
    assert "--gradient_checkpointing=false" in said[0]
    assert said[1].startswith("would also fit: --base_model_precision=int8")
    tight, said = fitted(run, 10**12, monkeypatch, f"{(kept.training - 1_000_000) / 1e6}MB")
    assert tight.model.base_model_precision == "int8"
    assert predict_memory(tight, TinyChroma(), SIZE).training <= kept.training - 1_000_000
    assert "--base_model_precision=int8" in said[0]


def test_a_checkpoint_keeps_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training goes on, also where another would now be the fastest."""
    before = {"base_model_precision": "int4", "text_encoder_1_precision": "int8"}
    run = fitted(make_run_config(), 10**12, monkeypatch, before=before)[0]
    assert {name: resolved_options(run)[name] for name in before} == before
    assert run.model.gradient_checkpointing is False


def test_where_nothing_fits_the_cheapest_changes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = predict_memory(make_run_config(), TinyChroma(), SIZE)
    monkeypatch.setattr(preflight, "predict_memory", lambda *_: plan)
    with pytest.raises(ConfigError, match="nothing fits") as refused:
        fitted(make_run_config(train_batch_size=2, lora_rank=8), 1000, monkeypatch)
    named = [line.split()[0] for line in str(refused.value).splitlines()[1:]]
    assert named == ["train_batch_size", "optimizer", "lora_rank", "resolution"]


def test_auto_recomputes_what_memory_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    run, family, told = make_run_config(gradient_checkpointing="auto"), TinyChroma(), list[Event]()
    kept = predict_memory(run, family, SIZE, memory=BlockMemoryPolicy())
    monkeypatch.setattr(preflight.registry, "get_family", lambda name: family)

    def settled(free: int) -> object:
        there = MachineResources("a card", "cpu", 1e13, free + HOST_RUNTIME_BYTES["cpu"], 10**12)
        monkeypatch.setattr(preflight, "detect_budget", lambda device: there)
        return preflight.preflight_check(run, SIZE, told.append).model.gradient_checkpointing

    assert settled(kept.training) == 0
    some = settled(kept.training - 1)
    assert isinstance(some, int)
    assert some > 0
    assert any(
        isinstance(event, NoticeIssued) and event.message.startswith("plan: ") for event in told
    )


def test_disks_with_too_little_space(tmp_path: Path) -> None:
    run = make_run_config(output_dir=str(tmp_path / "run"))
    needs = {"download": 0, "quantised base": 0, "checkpoints": 10**18, "result": 0}
    ((folder, needed, free),) = find_disk_shortages(run, needs)
    assert folder == tmp_path / "run"
    assert free < needed == 10**18
    assert find_disk_shortages(run, {**needs, "checkpoints": 1}) == []


def test_a_converted_base_is_not_written_again(tmp_path: Path) -> None:
    run = make_run_config(base_model_precision="nf4", quantized_cache_dir=str(tmp_path))
    needs = dict.fromkeys(("download", "checkpoints", "result"), 0) | {"quantised base": 10**18}
    assert find_disk_shortages(run, needs)
    with (tmp_path / "chroma-nf4-1-0123.safetensors").open("wb") as file:
        file.truncate(10**12)
    assert find_disk_shortages(run, needs | {"quantised base": 10**12}) == []


def test_cached_files_are_free_memory_in_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "max": "8000",
        "current": "7000\n",
        "stat": "anon 900\nactive_file 2000\ninactive_file 4000\n",
    }
    for name, text in told.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(machine_resources, "CGROUP_PATH", tmp_path)
    assert machine_resources.free_host_bytes() == 7000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_resources.free_host_bytes() != 7000


def test_a_way_replaces_the_one_that_was_set() -> None:
    run = make_run_config(device="auto", gradient_checkpointing_interval=2, musubi_blocks_to_swap=2,
                 gradient_checkpointing_backend="offload")  # fmt: skip
    model = fit.with_options(
        run, fit.MemoryConfig("nf4", BlockMemoryPolicy(1), BLOCKS, 0, 0.0).options()
    ).model
    assert block_memory_policy(model, BLOCKS) == BlockMemoryPolicy(2)


@pytest.mark.parametrize(
    ("text", "size"), [("12GB", 12e9), ("12", 12e9), ("11.5 GiB", 11.5 * 2**30), ("800mb", 8e8)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_memory_size(text) == int(size)


def test_a_word_that_is_no_size() -> None:
    with pytest.raises(ConfigError, match="use for example 12GB"):
        parse_memory_size("a lot")


def test_settings_go_down_one_by_one() -> None:
    words = []
    for change in ({"gradient_checkpointing": False}, {}, {"base_model_precision": "int8"},
                   {"base_model_precision": "nf4"}):  # fmt: skip
        words.append(
            memory_saving.suggest_next_setting(
                make_run_config(**{"gradient_checkpointing": True, **change})
            )
        )
    assert [word.split(": ")[1].split(" = ")[0] for word in words] == [
        "gradient_checkpointing", "base_model_precision", "base_model_precision", "optimizer",
    ]  # fmt: skip


def test_the_command_needs_nothing() -> None:
    done = CliRunner().invoke(
        command, ["--model_flavour=nano", "--resolution=128", "--lora_rank", "2"]
    )
    assert done.exit_code == 0, done.output
    assert "weights" in done.output
    assert "estimate" in done.output


def test_what_needs_a_gpu_is_planned_without_one() -> None:
    words = [
        "--model_flavour=nano",
        "--resolution=128",
        "--lora_rank=2",
        "--musubi_blocks_to_swap=2",
    ]
    for more in ([], ["--device=cuda"], ["--fit=8GB"]):
        done = CliRunner().invoke(command, [*words, *more])
        assert done.exit_code == 0, done.output
        assert "GPU memory while training" in done.output
    assert "musubi_blocks_to_swap = 0" in done.output


def test_the_evaluation_model_is_part_of_the_plan(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip")
    size = (clip / "model.safetensors").stat().st_size
    plain = predict_memory(make_run_config(), TinyChroma(), SIZE, "cuda")
    local = predict_memory(
        make_run_config(
            evaluation_type="clip,likeness",
            pretrained_evaluation_model_name_or_path=str(clip),
        ),
        TinyChroma(),
        SIZE,
        "cuda",
    )
    assert local.allowances["image metrics"] == size, "once, however many metrics share it"
    assert local.training == plain.training + size
    assert local.disk["download"] == plain.disk["download"]
    remote = predict_memory(
        make_run_config(evaluation_type="diversity"), TinyChroma(), SIZE, "cuda"
    )
    assert remote.disk["download"] == plain.disk["download"] + DEFAULT_MODEL_BYTES


def test_the_encoders_count_with_their_activations() -> None:
    """A linear of 8 to 16 numbers, on 4 rows of floats: input, weights and output."""
    linear = nn.Linear(8, 16, device="meta").requires_grad_(False)
    described = EncoderPass(linear, lambda: linear(torch.empty(4, 8)))
    weights = 4 * (16 * 8 + 16)
    assert fake_encoders.peak_bytes(described, 1, 5) == weights + 4 * (4 * 8 + 4 * 16)
    assert fake_encoders.peak_bytes(None, 1, 5) == 5


def test_the_largest_phase_decides() -> None:
    """Beside the weights, VAE decoding may need more than a step, and so may a model before it."""
    plan = predict_memory(make_run_config(), TinyChroma(), SIZE, "cuda")
    assert plan.peak == plan.training
    context = plan.allowances["context"]
    for uses in ({"before": {"VAE": 10**12}}, {"validation": {"VAE decoding": 10**12}}):
        assert dataclasses.replace(plan, **uses).peak == 10**12 + context
    held = sum(plan.parts[part] for part in ("weights", "adapters", "optimizer"))
    assert plan.validation["modulations"] == held + 1_000_000
    assert plan.before.keys() == {"text encoder", "VAE"}


def test_auto_keeps_the_choice_of_the_run_folder_while_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, family = make_run_config(gradient_checkpointing="auto"), TinyChroma()
    monkeypatch.setattr(prediction, "LARGE_MODEL_BYTES", 0)
    away = BlockMemoryPolicy(approximator_on_host=True)
    none = predict_memory(run, family, SIZE, "cuda", away)
    kept, too_small = none.training, none.tensor_bytes - 1

    def choose(free: int, stored: object) -> tuple[bool | int, str]:
        (tmp_path / "config.json").write_text(json.dumps({"gradient_checkpointing": stored}))
        card = dataclasses.replace(CARD, device_free_bytes=free)
        choice = choose_checkpointing(run, family, SIZE, card, tmp_path)
        return choice.value, choice.reason

    assert choose(kept, "auto") == (False, "planned for a card")
    assert choose(kept, 2) == (2, "as in the run folder")
    assert choose(kept, True) == (True, "as in the run folder")
    assert choose(too_small, True) == (True, "as in the run folder")
    assert choose(too_small, False) == (True, "planned for a card")
    for damaged in ([], "many", -4):
        assert choose(kept, damaged) == (False, "planned for a card")


def test_auto_plans_no_small_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps all activations where they surely fit, and is planned where they may not."""
    run, family = make_run_config(gradient_checkpointing="auto"), TinyChroma()
    measured: list[int] = []
    measure = fake_step.measure_fake_step

    def count(*inputs: Any) -> StepMeasurement:
        measured.append(1)
        return measure(*inputs)

    monkeypatch.setattr(fake_step, "measure_fake_step", count)
    card = dataclasses.replace(CARD, device_free_bytes=10**12)
    choice = choose_checkpointing(run, family, SIZE, card)
    assert (choice.value, choice.reason, measured) == (False, "a small base", [])
    assert f"{BLOCKS} of {BLOCKS} blocks keep their activations, 0 compute" in str(choice)
    small = dataclasses.replace(CARD, device_free_bytes=100_000_000)
    assert choose_checkpointing(run, family, SIZE, small).reason == "planned for a card"
    assert measured


def test_what_fits_without_checkpointing_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = fake_step.measure_fake_step

    def count(*inputs: Any) -> StepMeasurement:
        measured.append(1)
        return measure(*inputs)

    monkeypatch.setattr(fake_step, "measure_fake_step", count)
    told: list[str] = []
    run = make_run_config()
    search = MemoryConfigSearch(run, TinyChroma(), SIZE, CARD, progress=told.append)
    assert fit.blocks_to_checkpoint(search, 10**12) == 0
    assert len(measured) == 1
    assert told == ["measuring a step with 0 checkpointed blocks ..."]


def test_scores_of_attention_are_counted_where_no_flash_kernel_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole matrices: three of the block that runs, and one of each block that keeps them."""

    def scores(kind: str, **options: Any) -> int:
        plan = predict_memory(make_run_config(**options), TinyChroma(), SIZE, kind)
        return plan.allowances.get("attention scores", 0)

    feed = predict_memory(make_run_config(), TinyChroma(), SIZE, "mps").feed
    rows = feed.size_px[0] * feed.size_px[1] // 256 + feed.text_rows
    matrix = feed.samples * CONFIG.num_attention_heads * rows**2 * 2
    assert scores("mps", gradient_checkpointing=True) == 3 * matrix
    assert scores("mps", gradient_checkpointing=False) == (3 + BLOCKS) * matrix
    assert scores("cuda") == scores("cpu") == 0
    monkeypatch.setattr(torch.version, "hip", "6.2")
    for is_there, matrices in ((True, 0), (False, 3)):
        monkeypatch.setattr(
            torch.backends.cuda, "is_flash_attention_available", lambda there=is_there: there
        )
        assert scores("cuda", gradient_checkpointing=True) == matrices * matrix

"""From measured bytes to what a run needs; what is remembered; which way fits; what a person reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from simpletuner.cli.plan import command
from simpletuner.config.load import resolved
from simpletuner.config.schema import RunConfig
from simpletuner.config.values import read_size
from simpletuner.data.geometry import Framing
from simpletuner.errors import ConfigError
from simpletuner.events.types import Event, Noted
from simpletuner.models.blocks import block_memory
from simpletuner.models.family import BlockMemory
from simpletuner.training.plan import advice, announce, fit, prediction, room, stored, wording
from simpletuner.training.plan.fit import Ladder
from simpletuner.training.plan.imitation import Feed
from simpletuner.training.plan.prediction import predict
from simpletuner.training.plan.room import Room, lacking_on_disks
from tests.training.plan.small import CONFIG, FEED, Small, run_of, sketch_of

BLOCKS = CONFIG.num_layers + CONFIG.num_single_layers
SIZE = (Framing(resolution=256),)
CARD = Room("a card", "cuda", 1e13)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_second_answer_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = predict(run_of(), Small(), SIZE)

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(prediction, "measure", never)
    assert predict(run_of(learning_rate=0.5, seed=7), Small(), SIZE) == first
    with pytest.raises(AssertionError, match="again"):
        predict(run_of(lora_rank=8), Small(), SIZE)


@pytest.mark.parametrize(
    "other",
    [{"lora_rank": 5}, {"optimizer": "lion"}, {"base_model_precision": "nf4"}, {"mixed_precision": "no"},
     {"gradient_accumulation_steps": 2}, {"use_dora": True}],
)  # fmt: skip
def test_what_moves_bytes_is_another_key(other: dict[str, object]) -> None:
    def key(run: RunConfig, feed: Feed = FEED, memory: BlockMemory = BlockMemory()) -> str:  # noqa: B008
        return stored.key(run, sketch_of(run), memory, feed, 1)

    run = run_of(**other)
    assert key(run) != key(run_of())
    assert key(run) != key(run, dataclasses.replace(FEED, samples=3))
    assert key(run) != key(run, memory=BlockMemory(1))


def test_what_waits_on_the_host_is_taken_from_the_device() -> None:
    """All blocks swapped: two rooms of the largest block instead of all blocks."""
    run, family = run_of(), Small()
    here = predict(run, family, SIZE, "cuda", BlockMemory(BLOCKS))
    swapped = predict(run, family, SIZE, "cuda", BlockMemory(BLOCKS, 1, BLOCKS, True, True))
    sizes = [sum(parameter.nbytes for parameter in block.parameters()) for block in sketch_of(run).blocks]
    less = here.parts["weights"] - swapped.parts["weights"]
    assert less == pytest.approx(sum(sizes) - 2 * max(sizes) + 1_000_000, rel=0.01)
    rows = (256 // 16) ** 2 + 512
    assert here.parts["activations"] - swapped.parts["activations"] == (BLOCKS - 2) * rows * 256 * 2
    assert swapped.host["swapped blocks"] >= sum(sizes)
    assert swapped.moved == pytest.approx(2 * sum(sizes), rel=0.01)


def test_an_average_is_where_it_is_kept() -> None:
    plain, on_host, beside = (
        predict(run_of(**options), Small(), SIZE, "cuda")
        for options in ({}, {"use_ema": True}, {"use_ema": True, "ema_device": "accelerator"})
    )
    assert on_host.parts == plain.parts
    assert on_host.host["average"] == 4 * plain.trained
    assert beside.parts["optimizer"] - plain.parts["optimizer"] == 4 * plain.trained


def test_the_largest_set_decides() -> None:
    sketch = sketch_of(run_of())
    framings = (Framing(resolution=512), Framing(resolution=1.0, resolution_type="area"))
    assert prediction.feed_of(run_of(), framings, sketch) == Feed(1, (1024, 1024), 512)
    wide = (Framing(resolution=512, resolution_type="pixel"),)
    assert prediction.feed_of(run_of(tokenizer_max_length=77), wide, sketch) == Feed(1, (768, 512), 77)


def test_the_chosen_way_fits_and_a_tighter_limit_is_slower() -> None:
    run = run_of(device="auto")
    ladder = Ladder(run, Small(), SIZE, CARD)
    kept, recomputed = ladder.kept.training, ladder.recomputed.training
    assert recomputed < kept
    loose = fit.fit(ladder, kept)
    assert loose.chosen is not None
    assert (loose.chosen.precision, loose.chosen.memory.checkpointed) == ("no_change", 0)
    between = fit.fit(ladder, (kept + recomputed) // 2)
    assert between.chosen is not None
    assert between.chosen.exact
    assert between.chosen.size <= (kept + recomputed) // 2
    assert between.chosen.seconds >= loose.chosen.seconds
    nothing = fit.fit(ladder, 1000)
    assert nothing.chosen is None
    assert "nothing fits" in wording.ways(run, nothing)[0]
    least = ladder.least()
    assert (least.precision, least.memory) == ("nf4", BlockMemory(BLOCKS, 1, BLOCKS, True, True))
    lines = announce.smaller(ladder, 1000).splitlines()
    assert f"--musubi_blocks_to_swap={BLOCKS}" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["optimizer", "resolution"]  # the rank is 4 already


def test_a_training_that_cannot_fit_is_refused_with_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run, family = run_of(gradient_checkpointing=False), Small()
    plan = predict(run, family, SIZE)
    limit = predict(run, family, SIZE, memory=BlockMemory(BLOCKS)).tensors + 1_000
    monkeypatch.setattr(announce.registry, "family", lambda name: family)
    total = limit + prediction.RUNTIME["cpu"]
    monkeypatch.setattr(announce, "found", lambda device: Room("a card", "cpu", 1e13, total, 10**12))
    assert plan.tensors > limit
    with pytest.raises(ConfigError, match=r"needs .* and a card has") as refused:
        announce.announce(run, SIZE, lambda event: None)
    assert refused.value.exit_code == 2
    assert "--base_model_precision=" in str(refused.value)


def test_at_full_rank_a_lora_is_tried_before_a_smaller_picture() -> None:
    changes = list(advice.steps(run_of(model_type="full", optimizer="adamw_bf16")))
    assert changes[-2:] == [{"model_type": "lora"}, {"resolution": 768.0}]


def fitted(
    run: RunConfig, free: int, monkeypatch: pytest.MonkeyPatch, within: str = "",
    before: dict[str, object] | None = None,
) -> tuple[RunConfig, list[str]]:  # fmt: skip
    told = list[Event]()
    room = Room("a card", "cpu", 1e13, free + prediction.RUNTIME["cpu"], 10**12)
    monkeypatch.setattr(announce.registry, "family", lambda name: Small())
    monkeypatch.setattr(announce, "found", lambda device: room)
    run = announce.announce(run, SIZE, told.append, within, before)
    return run, [event.message for event in told if isinstance(event, Noted)]


def test_a_training_takes_the_fastest_way_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bits without recomputing are quicker than recomputing; what is said is what is set."""
    run = run_of(gradient_checkpointing=True)
    kept = predict(run, Small(), SIZE, memory=BlockMemory())
    roomy, said = fitted(run, kept.training, monkeypatch)
    assert (roomy.model.base_model_precision, roomy.model.gradient_checkpointing) == ("no_change", False)
    assert "--gradient_checkpointing=false" in said[0]
    assert said[1].startswith("would fit too: --base_model_precision=int8")
    tight, said = fitted(run, 10**12, monkeypatch, f"{(kept.training - 1_000_000) / 1e6}MB")
    assert tight.model.base_model_precision == "int8"
    assert predict(tight, Small(), SIZE).training <= kept.training - 1_000_000
    assert "--base_model_precision=int8" in said[0]


def test_a_checkpoint_keeps_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training goes on, also where another would now be the fastest."""
    before = {"base_model_precision": "int4", "text_encoder_1_precision": "int8"}
    run = fitted(run_of(), 10**12, monkeypatch, before=before)[0]
    assert {name: resolved(run)[name] for name in before} == before
    assert run.model.gradient_checkpointing is False


def test_where_nothing_fits_the_cheapest_changes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = predict(run_of(), Small(), SIZE)
    monkeypatch.setattr(announce, "predict", lambda *_: plan)
    with pytest.raises(ConfigError, match="nothing fits") as refused:
        fitted(run_of(train_batch_size=2, lora_rank=8), 1000, monkeypatch)
    named = [line.split()[0] for line in str(refused.value).splitlines()[1:]]
    assert named == ["train_batch_size", "optimizer", "lora_rank", "resolution"]


def test_auto_recomputes_what_memory_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    run, family, told = run_of(gradient_checkpointing="auto"), Small(), list[Event]()
    kept = predict(run, family, SIZE, memory=BlockMemory())
    monkeypatch.setattr(announce.registry, "family", lambda name: family)

    def settled(free: int) -> object:
        there = Room("a card", "cpu", 1e13, free + prediction.RUNTIME["cpu"], 10**12)
        monkeypatch.setattr(announce, "found", lambda device: there)
        return announce.announce(run, SIZE, told.append).model.gradient_checkpointing

    assert settled(kept.training) == 0
    some = settled(kept.training - 1)
    assert isinstance(some, int)
    assert some > 0
    assert any(isinstance(event, Noted) and event.message.startswith("plan: ") for event in told)


def test_disks_with_too_little_space(tmp_path: Path) -> None:
    run = run_of(output_dir=str(tmp_path / "run"))
    needs = {"download": 0, "quantised base": 0, "checkpoints": 10**18, "result": 0}
    ((folder, needed, free),) = lacking_on_disks(run, needs)
    assert folder == tmp_path / "run"
    assert free < needed == 10**18
    assert lacking_on_disks(run, {**needs, "checkpoints": 1}) == []


def test_a_converted_base_is_not_written_again(tmp_path: Path) -> None:
    run = run_of(base_model_precision="nf4", quantized_cache_dir=str(tmp_path))
    needs = dict.fromkeys(("download", "checkpoints", "result"), 0) | {"quantised base": 10**18}
    assert lacking_on_disks(run, needs)
    with (tmp_path / "chroma-nf4-1-0123.safetensors").open("wb") as file:
        file.truncate(10**12)
    assert lacking_on_disks(run, needs | {"quantised base": 10**12}) == []


def test_cached_files_are_free_memory_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"max": "8000", "current": "7000\n", "stat": "anon 900\nactive_file 2000\ninactive_file 4000\n"}
    for name, text in told.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    assert room.free_host() == 7000
    (tmp_path / "memory.max").write_text("max\n")
    assert room.free_host() != 7000


def test_a_way_replaces_the_one_that_was_set() -> None:
    run = run_of(device="auto", gradient_checkpointing_interval=2, musubi_blocks_to_swap=2,
                 gradient_checkpointing_backend="offload")  # fmt: skip
    model = fit.changed(run, fit.Way("nf4", BlockMemory(1), BLOCKS, 0, 0.0).options()).model
    assert block_memory(model, BLOCKS) == BlockMemory(2)


@pytest.mark.parametrize(
    ("text", "size"), [("12GB", 12e9), ("12", 12e9), ("11.5 GiB", 11.5 * 2**30), ("800mb", 8e8)]
)
def test_sizes(text: str, size: float) -> None:
    assert read_size(text) == int(size)


def test_a_word_that_is_no_size() -> None:
    with pytest.raises(ConfigError, match="write 12GB"):
        read_size("a lot")


def test_settings_go_down_one_by_one() -> None:
    words = []
    for change in ({"gradient_checkpointing": False}, {}, {"base_model_precision": "int8"},
                   {"base_model_precision": "nf4"}):  # fmt: skip
        words.append(advice.next_down(run_of(**change)))
    assert [word.split(": ")[1].split(" = ")[0] for word in words] == [
        "gradient_checkpointing", "base_model_precision", "base_model_precision", "optimizer",
    ]  # fmt: skip


def test_the_command_needs_nothing() -> None:
    done = CliRunner().invoke(command, ["--model_flavour=nano", "--resolution=128", "--lora_rank", "2"])
    assert done.exit_code == 0, done.output
    assert "weights" in done.output
    assert "estimate" in done.output


def test_what_needs_a_gpu_is_planned_without_one() -> None:
    words = ["--model_flavour=nano", "--resolution=128", "--lora_rank=2", "--musubi_blocks_to_swap=2"]
    for more in ([], ["--device=cuda"], ["--fit=8GB"]):
        done = CliRunner().invoke(command, [*words, *more])
        assert done.exit_code == 0, done.output
        assert "GPU memory while training" in done.output
    assert "musubi_blocks_to_swap = 0" in done.output

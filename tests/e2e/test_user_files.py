"""Nothing of the user's is touched: a run owns its folder, and in it what it has written itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.cli.checked_config import output_dir_problems
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.errors import CheckpointError, ConfigError
from tests.e2e.training_project import TrainingProject

DRAWING = {
    "validation_disable": False, "validation_prompt": "a red square", "validation_resolution": "64",
    "validation_num_inference_steps": 1, "validation_step_interval": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TrainingProject:
    """A run of two steps that writes everything that runs write."""
    project = TrainingProject(tmp_path_factory.mktemp("files"), max_train_steps=2, **DRAWING)
    project.train()
    return project


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


FOREIGN = ("config.json", "README.md", "report.html", "rejected.jsonl", "exit.json", "train.log",
           "pytorch_lora_weights.safetensors", "ema/notes.txt", "transformer/notes.txt",
           "transformer_native.safetensors", "thesis.pdf")  # fmt: skip


def test_a_folder_of_the_user_is_left_as_it_is(project: TrainingProject) -> None:
    mine = project.root / "mine"
    for name in FOREIGN:
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(f"mine: {name}")
    before = contents(mine)
    error = project.train_and_expect_error(output_dir=str(mine))
    assert isinstance(error, ConfigError)
    assert "README.md" in str(error)
    assert str(mine / "run") in str(error)
    assert contents(mine) == before


def test_the_command_line_refuses_it_before_torch(project: TrainingProject) -> None:
    for output_dir, said in (
        (project.root, "contains the"),
        (project.root / "pictures" / "run", "is inside the dataset photos"),
    ):
        loaded = project.load_config(output_dir=str(output_dir))
        backends = read_dataset_file(
            Path(loaded.config.data.data_backend_config), loaded.config.data
        )
        problems = output_dir_problems(loaded, backends)
        assert any(said in problem.message for problem in problems)
        assert all(
            problem.location.startswith(str(project.root)) or problem.location
            for problem in problems
        )


def test_a_run_goes_on_in_its_own_folder_and_what_a_person_added_stays(
    project: TrainingProject,
) -> None:
    run = project.root / "run"
    (run / "my notes.txt").write_text("good at step 2")
    (run / "checkpoint-2" / "notes.txt").write_text("the best one")
    card = (run / "README.md").read_text() + "\nSold to a museum."
    (run / "README.md").write_text(card)
    edited = json.dumps({**json.loads((run / "config.json").read_text()), "seed": 42}) + "\n// mine"
    (run / "config.json").write_text(edited)
    project.train(max_train_steps=6, checkpoints_total_limit=1)
    assert (run / "my notes.txt").read_text() == "good at step 2"
    kept = {path.read_text() for path in run.glob("earlier-*/**/*") if path.is_file()}
    assert {card, edited, "the best one"} <= kept
    assert not (run / "checkpoint-2").exists()


def test_a_finished_run_is_not_trained_over(project: TrainingProject, tmp_path: Path) -> None:
    run = project.train(output_dir=str(tmp_path / "finished"))
    for folder in run.glob("checkpoint-*"):
        folder.rename(tmp_path / folder.name)
    before = (run / "pytorch_lora_weights.safetensors").read_bytes()
    error = project.train_and_expect_error(output_dir=str(run), learning_rate=1e-3)
    assert isinstance(error, CheckpointError)
    assert "resume_from_checkpoint=never" in str(error)
    assert (run / "pytorch_lora_weights.safetensors").read_bytes() == before
    project.train(output_dir=str(run), resume_from_checkpoint="never", learning_rate=1e-3)
    assert (run / "earlier-1" / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_when_all_checkpoints_are_damaged_the_person_is_asked(
    project: TrainingProject, tmp_path: Path
) -> None:
    run = project.train(output_dir=str(tmp_path / "damaged"))
    for folder in run.glob("checkpoint-*"):
        (folder / "manifest.json").write_text("{}")
    for _ in range(2):  # at every start, not at the first one alone
        error = project.train_and_expect_error(output_dir=str(run))
        assert isinstance(error, CheckpointError)
        assert "all checkpoints are damaged" in str(error)

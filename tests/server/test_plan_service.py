"""Plans: one process at a time, the newest question wins, nothing is left behind."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simpletuner.server import plan_service
from simpletuner.server.api_errors import ApiError
from simpletuner.server.plan_service import PlanProcess, PlanService, plan_relevant_options
from simpletuner.server.schemas.configs import PlanRequest, PlanResponse
from simpletuner.server.workspace import Workspace

# Says what it was asked, once it may: it waits while a file named "wait" is in its working
# directory.
FAKE = """
import json, os, pathlib, sys, time
with open("started", "a") as log:
    log.write(f"{os.getpid()}\\n")
if os.path.exists("wait"):
    print("trying settings", file=sys.stderr, flush=True)
words = sys.argv[1:]
config = json.loads(pathlib.Path(words[words.index("--config") + 1]).read_text())
while os.path.exists("wait"):
    time.sleep(0.02)
if config.get("lora_rank") == 13:
    sys.exit("13 brings bad luck")
if config.get("lora_rank") == 14:
    raise ValueError("secret of the machine")
variables = [name for name in os.environ if name.startswith("SIMPLETUNER_")]
print(json.dumps({"config": config, "words": words[2:], "variables": variables}))
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path.resolve())


@pytest.fixture
def plans(workspace: Workspace, tmp_path: Path) -> Iterator[PlanService]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    made = PlanService(workspace, (sys.executable, str(script)))
    yield made
    made.close()


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answer(plans: PlanService, asked: PlanRequest) -> PlanResponse:
    deadline = time.monotonic() + 60
    while (state := plans.get_or_start(asked)).state == "pending":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return state


def started(place: Workspace) -> list[int]:
    path = place.root / "started"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_plan_is_made_once(
    plans: PlanService, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMPLETUNER_SEED", "5")
    asked = PlanRequest(config={"network_rank": 8, "resolution": 512}, fit="12GB")
    state = answer(plans, asked)
    assert state.state == "ready"
    assert state.plan == {
        "config": {"lora_rank": 8, "resolution": 512},
        "words": ["--json", "--fit", "12GB"],
        "variables": [],
    }
    same = PlanRequest(
        config={"resolution": 512, "lora_rank": "8", "seed": 3, "validation_prompt": "x"},
        fit="12GB",
    )
    assert plans.get_or_start(same) == state
    assert len(started(workspace)) == 1
    assert answer(plans, PlanRequest(config=asked.config)).key != state.key


def test_problems_are_told_without_a_process(plans: PlanService, workspace: Workspace) -> None:
    state = plans.get_or_start(PlanRequest(config={"lora_rank": 0, "output_dir": "/etc"}))
    assert state.state == "failed"
    assert {problem.loc for problem in state.problems} == {"lora_rank", "output_dir"}
    for fit in ("", "a lot", "--json", "12GB; ls", "1e9"):
        with pytest.raises(ApiError):
            plans.get_or_start(PlanRequest(config={}, fit=fit))
    assert started(workspace) == []


def test_a_failure_is_told_once_and_tried_again(plans: PlanService, workspace: Workspace) -> None:
    for _ in range(2):
        state = answer(plans, PlanRequest(config={"lora_rank": 13}))
        assert [problem.message for problem in state.problems] == ["13 brings bad luck"]
    assert len(started(workspace)) == 2
    state = answer(plans, PlanRequest(config={"lora_rank": 14}))
    assert "secret" not in state.model_dump_json()
    assert state.state == "failed"


def test_the_newest_question_wins_when_nobody_asks_the_old_one(
    plans: PlanService, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace.root / "wait").touch()
    first, second = PlanRequest(config={"lora_rank": 1}), PlanRequest(config={"lora_rank": 2})
    assert plans.get_or_start(first).state == "pending"
    until(lambda: started(workspace))
    plans.get_or_start(second)
    assert alive(started(workspace)[0])  # somebody still waits for the first
    monkeypatch.setattr(plan_service, "ABANDONED_AFTER_S", 0.0)
    plans.get_or_start(second)
    until(lambda: not alive(started(workspace)[0]))
    (workspace.root / "wait").unlink()
    assert answer(plans, second).plan["config"] == {"lora_rank": 2}
    assert len(started(workspace)) == 2


def test_closing_and_the_time_limit_end_the_process(
    plans: PlanService, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace.root / "wait").touch()
    plans.get_or_start(PlanRequest(config={}))
    until(lambda: started(workspace))
    plans.close()
    assert not alive(started(workspace)[0])
    monkeypatch.setattr(plan_service, "PLAN_TIMEOUT_S", 0.5)
    state = answer(plans, PlanRequest(config={}))
    assert "took too long" in state.problems[0].message


def test_what_a_plan_depends_on() -> None:
    config = {
        "seed": 1,
        "lora_rank": 2,
        "validation_prompt": "x",
        "train_batch_size": 3,
        "report_to": "none",
    }
    assert plan_relevant_options(config) == {"lora_rank": 2, "train_batch_size": 3}


@pytest.mark.slow
def test_the_real_command(workspace: Workspace) -> None:
    plans = PlanService(workspace)
    state = answer(
        plans,
        PlanRequest(
            config={"model_flavour": "nano", "resolution": 128, "resolution_type": "pixel"}
        ),
    )
    assert state.plan is not None, state.problems
    assert json.loads(state.model_dump_json())["plan"]["training"] > 0


def test_modules_in_the_workspace_are_not_the_planner_s(tmp_path: Path) -> None:
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import json, os\nprint(json.dumps({'safe': os.environ.get('PYTHONSAFEPATH')}))"
    )
    process = PlanProcess({}, [], tmp_path, (sys.executable, str(fake)))
    while not process.has_ended(1.0):
        pass
    assert process.result()[0] == {"safe": "1"}


def test_a_plan_can_be_cancelled_and_says_how_far_it_is(
    plans: PlanService, workspace: Workspace
) -> None:
    (workspace.root / "wait").touch()
    asked = PlanRequest(config={"lora_rank": 4}, fit="12GB")
    plans.get_or_start(asked)
    until(lambda: plans.get_or_start(asked).progress == "trying settings")
    assert plans.get_or_start(asked).running_s > 0
    plans.cancel()
    (workspace.root / "wait").unlink()
    assert plans.get_or_start(asked).state == "pending"  # it was started anew
    until(lambda: len((workspace.root / "started").read_text().split()) == 2)


def test_the_plan_takes_the_size_of_the_images(workspace: Workspace, tmp_path: Path) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    command = (sys.executable, str(script))
    plans = PlanService(workspace, command, lambda config, datasets: (192, 128))
    config = {"resolution": 128, "resolution_type": "pixel"}
    planned = answer(plans, PlanRequest(config=config)).plan
    assert planned is not None
    assert planned["config"] == {"resolution": 156.767, "resolution_type": "pixel_area"}
    plans.close()

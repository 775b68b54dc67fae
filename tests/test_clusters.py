"""The files for clusters and the Dockerfile, as far as parsers and the options can check them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from simpletuner import __version__
from simpletuner.cli import COMMANDS
from simpletuner.cli.train import CONFIG_SOURCE_FLAGS
from simpletuner.config import flags
from simpletuner.config.load import config_from_resolved
from simpletuner.config.option_catalog import all_options

yaml = pytest.importorskip("yaml")
FOLDER = Path(__file__).parents[1] / "examples" / "clusters"
IMAGE = f"simpletuner:{__version__}"
INSTRUCTIONS = ["FROM", "RUN", "ARG", "USER", "WORKDIR", "ENV", "EXPOSE", "ENTRYPOINT", "CMD"]


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def check_options(words: list[str]) -> None:
    """Every flag after `simpletuner train` is an option."""
    for name, _ in flags.parse_flags(words):
        assert name in all_options() or name in CONFIG_SOURCE_FLAGS, name


def sbatch_options() -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", read("slurm.sbatch"), re.MULTILINE)
    return dict(lines)


def test_slurm_is_a_script_that_requeues() -> None:
    done = subprocess.run(["bash", "-n", FOLDER / "slurm.sbatch"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text, options = read("slurm.sbatch"), sbatch_options()
    assert text.startswith("#!/bin/bash\n")
    # directives after the first command would be ignored
    assert text.rindex("#SBATCH") < text.index("set -uo")
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert re.fullmatch(r"USR1@\d+", options["signal"])
    assert "requeue" in options
    command = re.search(r"^srun .*? simpletuner train (.*)$", text, re.MULTILINE)
    assert command is not None
    check_options(shlex.split(command[1]))


def run_batch(tmp_path: Path, code: int, restarts: int = 0) -> tuple[int, str]:
    """Run the script with commands that stand for Slurm's; return its exit code and what they did."""
    (tmp_path / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    for name, body in {
        "srun": f"exit {code}",
        "scontrol": f'echo "$@" >> {tmp_path}/calls',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", FOLDER / "slurm.sbatch"], cwd=tmp_path, env=environment, capture_output=True
    )
    calls = tmp_path / "calls"
    return done.returncode, calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize(
    ("code", "restarts", "calls"),
    [(75, 0, "requeue 7\n"), (137, 3, "requeue 7\n"), (75, 50, ""), (0, 0, ""), (3, 0, "")],
)
def test_slurm_queues_what_can_go_on(tmp_path: Path, code: int, restarts: int, calls: str) -> None:
    assert run_batch(tmp_path, code, restarts) == (code, calls)


def test_skypilot_runs_on_every_gpu_of_every_machine() -> None:
    task = yaml.safe_load(read("skypilot.yaml"))
    assert set(task) == {"name", "num_nodes", "resources", "file_mounts", "run"}
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["image_id"] == f"docker:{IMAGE}"
    variables = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    }  # fmt: skip
    script = task["run"].replace("cd /workspace", "").replace("exec simpletuner", "printf '%s\\n'")
    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
    )
    words = done.stdout.split()
    assert words.pop(0) == "train"
    check_options(words)
    given: dict[str, Any] = dict(flags.parse_flags(words))
    assert given == {
        "num_processes": "16", "num_machines": "2", "machine_rank": "1", "main_process_ip": "10.0.0.4",
    }  # fmt: skip
    mounted = [path for path in task["file_mounts"].values() if isinstance(path, str)]
    assert all((FOLDER.parents[1] / path).exists() for path in mounted if path != "./pictures")


def test_kubernetes_names_agree() -> None:
    service, job = yaml.safe_load_all(read("kubernetes.yaml"))
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], spec["completionMode"]) == ("batch/v1", "Indexed")
    assert spec["completions"] == spec["parallelism"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["image"] == IMAGE
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    words = container["command"]
    module = words.index("-m")
    assert words[0] == "torchrun"
    assert words[module : module + 3] == ["-m", "simpletuner", "train"]
    check_options(words[module + 3 :])
    settings = dict(word.removeprefix("--").split("=") for word in words[1:module])
    assert int(settings["nnodes"]) == spec["parallelism"]
    assert int(settings["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert settings["rdzv-endpoint"] == f"{name}-0.{pod['subdomain']}:29400"


def test_torchrun_has_these_flags() -> None:
    pytest.importorskip("torch")
    from torch.distributed.run import get_args_parser

    _, job = yaml.safe_load_all(read("kubernetes.yaml"))
    words = job["spec"]["template"]["spec"]["containers"][0]["command"][1:]
    parsed = get_args_parser().parse_args(words)
    assert (parsed.module, parsed.training_script) == (True, "simpletuner")
    assert parsed.rdzv_backend == "c10d"


def test_the_image_is_pinned_and_runs_as_a_user() -> None:
    text = re.sub(
        r"\\\n", " ", "\n".join(line for line in read("Dockerfile").splitlines() if line[:1] != "#")
    )
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    assert all(step[0] in INSTRUCTIONS for step in steps)
    first = steps[0]
    assert first[0] == "FROM"
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", first[1])
    found = {step[0]: step[1] for step in steps}
    assert "useradd" in text
    assert found["USER"] not in ("root", "0")
    assert json.loads(found["ENTRYPOINT"]) == ["simpletuner"]
    assert json.loads(found["CMD"])[0] in COMMANDS
    assert "--constraint /source/constraints/cuda.txt" in text
    assert found["ARG"] == "EXTRAS=cuda", "the constraints hold no packages of other extras"
    ignore = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignore if line.startswith("!")]
    assert ignore[0] == "*"
    assert {"src", "constraints", "pyproject.toml"} <= set(kept)
    assert all((FOLDER.parents[1] / path).exists() for path in kept)


def test_the_configuration_trains_on_several_processes() -> None:
    from simpletuner.config.documents import read_document

    options = read_document(FOLDER / "config.json", "config.json").value
    config_from_resolved({**options, "num_processes": 8})

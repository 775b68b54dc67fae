"""What `configure` knows while it asks: the files, the answers, the pictures, the device, the plan."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.cli.questions import QUESTIONS, Lines
from simpletuner.config.catalog import aliases, catalog
from simpletuner.config.environment import expand
from simpletuner.config.files import read_document
from simpletuner.config.load import Attempt, attempt_mapping, resolved
from simpletuner.config.paths import shown as short
from simpletuner.config.proposals import FULL, NANO, PLANNED, for_memory
from simpletuner.config.values import NULL
from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    from simpletuner.cli.survey import Survey
    from simpletuner.server.planning import Planning
    from simpletuner.server.wire.system import Device

PICTURES = "instance_data_dir"
OF_BOTH = ("resolution", "resolution_type", "caption_strategy", "instance_prompt")  # option and dataset field
USUAL_FOLDERS = ("pictures", "photos", "images", "datasets/photos")
STEPS = (500, 3000)
VISITS = 100  # of each picture, within STEPS
PATIENCE_S = 3.0
GB = 1e9
NO_CHANGE = "no_change"


class Wizard:
    """What is known and proposed, and what an answer comes to. Later wins: proposal, file, answer, --set."""

    def __init__(self, speaker: Lines, target: Path, cwd: Path, given: dict[str, Any]) -> None:
        self.speaker, self.target, self.cwd, self.given = speaker, target, cwd, given
        self.old = self._read_config()
        self.editing = bool(self.old)
        self.sets_path, self.sets = self._read_sets()
        own = [entry for entry in self.sets if entry.get("dataset_type", "image") == "image"]
        self.entry: dict[str, Any] = own[0] if own else {}
        if len(own) == 1 and not isinstance(self.entry.get("instance_prompt"), list):
            self.old |= {name: self.entry.pop(name) for name in OF_BOTH if name in self.entry}
        # What a set says for itself would make an answer idle, and a run has one length.
        idle = [name for name in OF_BOTH if name in self.entry]
        epochs = "num_train_epochs" in {*self.old, *given}
        self.settled = [*given, *idle, *(["max_train_steps"] if epochs else [])]
        self.answers: dict[str, Any] = {}
        self.survey: Survey | None = None
        self._running: tuple[dict[str, Any], Planning] | None = None
        self._planned: tuple[dict[str, Any], float] | None = None
        self._pool = ThreadPoolExecutor(1)  # nvidia-smi may take seconds
        self._devices = self._pool.submit(_devices)
        named = {name: value for name, value in given.items() if name in catalog()}
        tried = attempt_mapping(expand({**self.old, **named}), target.parent, cwd)
        if tried.loaded is None:
            raise ConfigError(tried.problems)
        now = resolved(tried.loaded.run)
        self.given |= {name: now[name] for name in named if not catalog()[name].path}
        if PICTURES in given:
            self.answer(PICTURES, given[PICTURES])

    def _read_config(self) -> dict[str, Any]:
        if not self.target.exists():
            return {}
        found = read_document(self.target, short(self.target, self.cwd)).value
        if not isinstance(found, dict):
            raise ConfigError(f"{short(self.target, self.cwd)} holds no object of options")
        plain = {name.lstrip("-").replace("-", "_"): value for name, value in found.items()}
        plain.pop("$schema", None)
        return {aliases().get(name, name): value for name, value in plain.items()}

    def _read_sets(self) -> tuple[Path, list[dict[str, Any]]]:
        named = self.given.get("data_backend_config") or self.old.get("data_backend_config")
        name = os.path.expanduser(expand(named)) if named else "multidatabackend.json"
        path = self.target.parent / name
        found = read_document(path, short(path, self.cwd)).value if path.exists() else []
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise ConfigError(f"{short(path, self.cwd)} is no list of datasets")
        return path, found

    def known(self, name: str) -> Any:
        """What holds now: "captions" of the pictures, or an option."""
        if name == "captions":
            return self.survey.captions if self.survey else "all"
        return self._all().get(name, catalog()[name].default)

    def proposed(self, name: str) -> Any:
        if name == PICTURES:
            usual = next((text for text in USUAL_FOLDERS if (self.cwd / text).is_dir()), None)
            there = self._pictures()
            return self.answers.get(name) or (short(there, self.cwd) if there else usual)
        return self.known(name)

    def before(self, name: str) -> str:
        """What is worth knowing at this question."""
        survey = self.survey
        if name == "train_batch_size" and survey is not None:
            return survey.buckets(float(self.known("resolution")), self.known("resolution_type"))
        if name == "max_train_steps" and survey is not None:
            steps, count = self.proposed(name), len(survey.sizes)
            visits = float(steps or 0) * float(self.known("train_batch_size")) / count
            return f"{steps} steps show each of {count} pictures {visits:.0f} times." if steps else ""
        if name == "base_model_precision":
            return self._hardware()
        quantisable = self.known("model_type") == "lora" and self.known("model_flavour") != "nano"
        return self._hardware() if name == "gradient_checkpointing" and not quantisable else ""

    def answer(self, name: str, raw: Any) -> None:
        """Take it, or raise what is wrong with it."""
        if name == PICTURES:
            from simpletuner.cli.survey import look

            if not raw:
                raise ConfigError("the folder of the pictures is needed: --set instance_data_dir=FOLDER")
            self.survey = look(self.cwd / os.path.expanduser(str(raw)))
            self.speaker.say(self.survey.told)
            self.answers[name] = raw
        else:
            tried = self._attempt({name: raw})
            if tried.loaded is None:
                raise ConfigError(tried.problems)
            value = raw if catalog()[name].path else resolved(tried.loaded.run)[name]
            blank = raw is None or (catalog()[name].nullable and str(raw).strip().lower() in NULL)
            if blank and name == "instance_prompt":
                raise ConfigError("one caption is needed, as there are no others")
            self.answers[name] = None if blank else value
        if self.speaker.patient:
            self._plan()

    def result(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What both files are to hold, proven by the reader. Raises ConfigError."""
        from simpletuner.data.backends import attempt_sets

        config = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in self._all().items()
            if value is not None
            and (
                name in self.given
                or (name in self.old and name not in self.answers)
                or value != catalog()[name].default
            )
        }
        folder, home = self.survey.folder if self.survey else self._pictures(), self.target.parent.resolve()
        if folder is not None and folder != self._pictures():
            inside = home in folder.parents
            self.entry[PICTURES] = (folder.relative_to(home) if inside else folder).as_posix()
        if not self.entry.get("id") and folder is not None:
            name = re.sub(r"[^\w.-]", "-", folder.name) or "pictures"
            self.entry = {"id": name, "type": "local", **self.entry}
            self.sets = [self.entry, *self.sets]
        tried = attempt_mapping(expand(config), self.target.parent, self.cwd)
        problems = list(tried.problems)
        if tried.data is not None:
            problems += attempt_sets(expand(self.sets), self.sets_path.parent, tried.data)[1]
        if problems:
            raise ConfigError(problems)
        return config, self.sets

    def need(self) -> str:
        """The planned memory, if the plan is there within a few seconds."""
        planned = self._memory()
        if planned is None:
            return "`simpletuner plan` says what it will need."
        return f"Planned memory: {planned:.1f} GB."

    def close(self) -> None:
        """End what runs in the background."""
        if self._running is not None:
            self._running[1].end()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pictures(self) -> Path | None:
        """The folder that the dataset file names, as its reader finds it."""
        written = self.entry.get(PICTURES)
        if not isinstance(written, str):
            return None
        path = os.path.expanduser(expand(written))
        beside = self.sets_path.parent / path
        return (beside if beside.is_dir() else self.cwd / path).resolve()

    def _all(self, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Every option that is not its default, less those that the others leave no room for."""
        given = {name: value for name, value in self.given.items() if name in catalog()}
        answered = {name: value for name, value in self.answers.items() if name in catalog()}
        found = {**self._fresh(), **self.old, **answered, **(more or {}), **given}
        captions = self.survey.captions if self.survey else "all"

        def known(name: str) -> Any:
            return captions if name == "captions" else found.get(name, catalog()[name].default)

        for question in QUESTIONS:
            ours = question.name not in self.old or question.needs.get("model_type") == ("lora",)
            if question.name in found and question.name not in given and ours and not question.applies(known):
                del found[question.name]
        return found

    def _attempt(self, more: Mapping[str, Any]) -> Attempt:
        return attempt_mapping(expand(self._all(more)), self.target.parent, self.cwd)

    def _fresh(self) -> dict[str, Any]:
        """Proposals for a file that is new; for an old one only what another model wants."""
        said = {**self.old, **self.answers, **self.given}
        flavour = said.get("model_flavour")
        if flavour is None:
            flavour = "base" if self.editing or self._device() else "nano"
        found: dict[str, Any] = {} if self.editing else {"model_flavour": flavour}
        if flavour == "nano" and self.old.get("model_flavour") != "nano":
            found = dict(NANO)
            if said.get("model_type") == "full":
                del found["learning_rate"]  # a LoRA's
        elif not self.editing:
            found |= self._for_pictures(int(said.get("train_batch_size", 1)))
            found |= FULL if said.get("model_type") == "full" else self._for_device(said)
        if self.editing:
            return found
        usual = self.target.parent in (self.cwd, self.cwd / "config")
        pictures = self.survey.folder.name if self.survey else "chroma"
        found["output_dir"] = f"output/{pictures if usual else self.target.parent.name}"
        if self.survey is not None and self.survey.captions != "all":
            found["caption_strategy"] = "textfile" if self.survey.captioned else "instanceprompt"
            found["missing_caption"] = "drop"
            found["instance_prompt"] = pictures
        found["validation_prompt"] = self.survey.sample if self.survey else None
        return found

    def _for_pictures(self, batch: int) -> dict[str, Any]:
        if self.survey is None:
            return {}
        steps = round(VISITS * len(self.survey.sizes) / batch, -2)
        side = self.survey.side_px
        resolution = 1024 if side >= 900 else 768 if side >= 700 else 512
        return {"resolution": resolution, "max_train_steps": int(min(STEPS[1], max(STEPS[0], steps)))}

    def _for_device(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The row of the table that fits, or the next where the plan says more than the table."""
        device = self._device()
        if device is None:
            return {}
        row, gb = for_memory(device.memory_total_bytes)
        precision = row["base_model_precision"]
        if self._planned is not None and self._planned[0].get("base_model_precision", NO_CHANGE) == precision:
            more, total = self._planned[1] - gb, (device.memory_total_bytes or 0) / GB
            fitting = (each for each, size in PLANNED if size <= gb and size + more <= total)
            row = next(fitting, PLANNED[-1][0])
            precision = row["base_model_precision"]
        if said.get("base_model_precision", precision) != precision:
            return {"base_model_precision": precision}
        hosted = device.kind != "mps" and said.get("gradient_checkpointing") is not False
        return {name: value for name, value in row.items() if hosted or name.endswith("precision")}

    def _device(self) -> Device | None:
        """The largest accelerator, None without one."""
        cards = [one for one in self._devices.result() if one.kind != "cpu"]
        return max(cards, key=lambda one: one.memory_total_bytes or 0, default=None)

    def _hardware(self) -> str:
        device, planned = self._device(), self._memory()
        size = (device.memory_total_bytes or 0) / GB if device else 0.0
        found = f"Found: {device.name}, {size:.1f} GB." if device else "No accelerator was found."
        precision = self.proposed("base_model_precision")
        if planned is not None:
            return f"{found} Planned with {precision}: {planned:.1f} GB."
        if device is None and self.known("model_flavour") != "nano":
            return f"{found} Chroma's 8.9 billion weights are too many for a CPU; flavour nano runs on one."
        if device is None or self.known("model_type") == "full":
            return f"{found} The plan is not ready."
        gb = for_memory(device.memory_total_bytes)[1]
        table = f"{gb:.1f} GB with {precision} for rank 16, 1024 px, batch 1"
        return f"{found} The plan is not ready; the README's table says {table}."

    def _plan(self) -> None:
        """Let a process plan what holds now, unless it does so already."""
        from simpletuner.server.planning import Planning, bearing

        tried = self._attempt({})
        if tried.loaded is None:
            return
        run = tried.loaded.run
        config = bearing({name: value for name, value in resolved(run).items() if value is not None})
        if self._running is not None and self._running[0] != config:
            self._running[1].end()
            self._running = None
        if self._running is None and (self._planned is None or self._planned[0] != config):
            device = self._device()
            kind = "cpu" if device is None else "cuda" if device.kind == "rocm" else device.kind
            self._running = config, Planning(config, ["--device", kind], self.cwd)

    def _memory(self) -> float | None:
        """Planned GB of what holds now; None where no plan is ready within PATIENCE_S."""
        if not self.speaker.patient:
            return None
        self._plan()
        if self._running is not None and self._running[1].done(PATIENCE_S):
            plan = self._running[1].result()[0]
            self._planned = None if plan is None else (self._running[0], plan["peak"] / GB)
            self._running = None
        return self._planned[1] if self._planned is not None and self._running is None else None


def _devices() -> list[Device]:
    from simpletuner.server.hardware import devices

    return devices()

"""State of `simpletuner configure`: files, answers, images, device and plan."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.cli.background_plan import GB, BackgroundPlan
from simpletuner.cli.wizard_questions import QUESTIONS, PipePrompter
from simpletuner.config.documents import read_document
from simpletuner.config.environment import expand_placeholders
from simpletuner.config.load import ConfigLoadResult, resolved_options, try_load_mapping
from simpletuner.config.option_catalog import all_options, option_aliases
from simpletuner.config.option_values import NULL_WORDS
from simpletuner.config.paths import display_path as short
from simpletuner.config.presets import (
    FULL_RANK_PRESET,
    MEMORY_PRESETS,
    NANO_PRESET,
    preset_for_memory,
)
from simpletuner.errors import ConfigError
from simpletuner.events.formatting import count_of

if TYPE_CHECKING:
    from simpletuner.cli.dataset_summary import DatasetSummary
    from simpletuner.server.schemas.system import DeviceInfo

IMAGE_FOLDER_FIELD = "instance_data_dir"
OPTION_AND_DATASET_FIELDS = (
    "resolution",
    "resolution_type",
    "caption_strategy",
    "instance_prompt",
)  # names of both an option and a dataset field
COMMON_IMAGE_FOLDERS = ("pictures", "photos", "images", "datasets/photos")
STEP_LIMITS = (500, 3000)
VISITS_PER_IMAGE = 100  # per image, within STEP_LIMITS
NO_CHANGE = "no_change"


class ConfigWizard:
    """State of the wizard. Later values win: proposal, file, answer, --set."""

    def __init__(
        self, speaker: PipePrompter, target: Path, cwd: Path, given: dict[str, Any]
    ) -> None:
        self.prompter, self.target_file, self.cwd, self.chosen_options = speaker, target, cwd, given
        self.existing_options = self._read_config()
        self.is_editing = bool(self.existing_options)
        self.dataset_file, self.dataset_entries = self._read_dataset_entries()
        own = [
            entry for entry in self.dataset_entries if entry.get("dataset_type", "image") == "image"
        ]
        self.image_entry: dict[str, Any] = own[0] if own else {}
        if len(own) == 1 and not isinstance(self.image_entry.get("instance_prompt"), list):
            self.existing_options |= {
                name: self.image_entry.pop(name)
                for name in OPTION_AND_DATASET_FIELDS
                if name in self.image_entry
            }
        # A value in the dataset entry overrides an answer, and a run has only one length.
        idle = [name for name in OPTION_AND_DATASET_FIELDS if name in self.image_entry]
        epochs = "num_train_epochs" in {*self.existing_options, *given}
        self.settled_names = [*given, *idle, *(["max_train_steps"] if epochs else [])]
        self.answers: dict[str, Any] = {}
        self.dataset_summary: DatasetSummary | None = None
        self._plan = BackgroundPlan(cwd)
        self._pool = ThreadPoolExecutor(1)  # nvidia-smi may take seconds
        self._device_detection = self._pool.submit(_detect_devices)
        named = {name: value for name, value in given.items() if name in all_options()}
        tried = try_load_mapping(
            expand_placeholders({**self.existing_options, **named}), target.parent, cwd
        )
        if tried.loaded is None:
            raise ConfigError(tried.problems)
        now = resolved_options(tried.loaded.config)
        self.chosen_options |= {name: now[name] for name in named if not all_options()[name].path}
        if IMAGE_FOLDER_FIELD in given:
            self.set_answer(IMAGE_FOLDER_FIELD, given[IMAGE_FOLDER_FIELD])

    def _read_config(self) -> dict[str, Any]:
        if not self.target_file.exists():
            return {}
        content = read_document(self.target_file, short(self.target_file, self.cwd)).value
        if not isinstance(content, dict):
            raise ConfigError(
                f"{short(self.target_file, self.cwd)} does not hold an object of options"
            )
        plain = {name.lstrip("-").replace("-", "_"): value for name, value in content.items()}
        plain.pop("$schema", None)
        return {option_aliases().get(name, name): value for name, value in plain.items()}

    def _read_dataset_entries(self) -> tuple[Path, list[dict[str, Any]]]:
        named = self.chosen_options.get("data_backend_config") or self.existing_options.get(
            "data_backend_config"
        )
        name = os.path.expanduser(expand_placeholders(named)) if named else "multidatabackend.json"
        path = self.target_file.parent / name
        entries = read_document(path, short(path, self.cwd)).value if path.exists() else []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ConfigError(f"{short(path, self.cwd)} does not hold a list of datasets")
        return path, entries

    def current_value(self, name: str) -> Any:
        """Return the current value of an option, or "captions": all, some or none of the images."""
        if name == "captions":
            return self.dataset_summary.caption_coverage if self.dataset_summary else "all"
        return self._merged_options().get(name, all_options()[name].default)

    def proposed_value(self, name: str) -> Any:
        if name == IMAGE_FOLDER_FIELD:
            usual = next(
                (text for text in COMMON_IMAGE_FOLDERS if (self.cwd / text).is_dir()), None
            )
            there = self._image_folder()
            return self.answers.get(name) or (short(there, self.cwd) if there else usual)
        return self.current_value(name)

    def question_context(self, name: str) -> str:
        """Return facts that help to answer this question, or an empty text."""
        survey = self.dataset_summary
        if name == "train_batch_size" and survey is not None:
            return survey.describe_buckets(
                float(self.current_value("resolution")), self.current_value("resolution_type")
            )
        if name == "max_train_steps" and survey is not None:
            steps, count = self.proposed_value(name), len(survey.sizes_px)
            passes = float(steps or 0) * float(self.current_value("train_batch_size")) / count
            return (
                f"{steps} steps = about {count_of(round(passes), 'pass', 'passes')} over "
                f"{count_of(count, 'image')}."
                if steps
                else ""
            )
        if name == "base_model_precision":
            return self._describe_hardware()
        quantisable = (
            self.current_value("model_type") == "lora"
            and self.current_value("model_flavour") != "nano"
        )
        return (
            self._describe_hardware()
            if name == "gradient_checkpointing" and not quantisable
            else ""
        )

    def set_answer(self, name: str, raw: Any) -> None:
        """Set an answer. Raises SimpleTunerError if it is not valid."""
        if name == IMAGE_FOLDER_FIELD:
            from simpletuner.cli.dataset_summary import summarize_dataset

            if not raw:
                raise ConfigError("Missing image folder. Pass --set instance_data_dir=FOLDER.")
            self.dataset_summary = summarize_dataset(self.cwd / os.path.expanduser(str(raw)))
            self.prompter.show_text(self.dataset_summary.text)
            self.answers[name] = raw
        else:
            tried = self._try_load({name: raw})
            if tried.loaded is None:
                raise ConfigError(tried.problems)
            value = raw if all_options()[name].path else resolved_options(tried.loaded.config)[name]
            blank = raw is None or (
                all_options()[name].nullable and str(raw).strip().lower() in NULL_WORDS
            )
            if blank and name == "instance_prompt":
                raise ConfigError("a caption is needed, because the images have none")
            self.answers[name] = None if blank else value
        if self.prompter.interactive:
            self._start_plan()

    def build_files(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the content of both files, checked by their readers. Raises ConfigError."""
        from simpletuner.data.dataset_file import try_read_datasets

        config = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in self._merged_options().items()
            if value is not None
            and (
                name in self.chosen_options
                or (name in self.existing_options and name not in self.answers)
                or value != all_options()[name].default
            )
        }
        folder, home = (
            self.dataset_summary.folder if self.dataset_summary else self._image_folder(),
            self.target_file.parent.resolve(),
        )
        if folder is not None and folder != self._image_folder():
            inside = home in folder.parents
            self.image_entry[IMAGE_FOLDER_FIELD] = (
                folder.relative_to(home) if inside else folder
            ).as_posix()
        if not self.image_entry.get("id") and folder is not None:
            name = re.sub(r"[^\w.-]", "-", folder.name) or "images"
            self.image_entry = {"id": name, "type": "local", **self.image_entry}
            self.dataset_entries = [self.image_entry, *self.dataset_entries]
        tried = try_load_mapping(expand_placeholders(config), self.target_file.parent, self.cwd)
        problems = list(tried.problems)
        if tried.data_options is not None:
            problems += try_read_datasets(
                expand_placeholders(self.dataset_entries),
                self.dataset_file.parent,
                tried.data_options,
            )[1]
        if problems:
            raise ConfigError(problems)
        return config, self.dataset_entries

    def describe_planned_memory(self) -> str:
        """Return a sentence about the planned memory, if the plan is ready within a few seconds."""
        planned = self._planned_memory_gb()
        if planned is None:
            return "Run `simpletuner plan` to estimate the memory."
        return f"Estimated memory: {planned:.1f} GB."

    def close(self) -> None:
        """Stop the background work."""
        self._plan.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _image_folder(self) -> Path | None:
        """Return the folder that the dataset file names, resolved like its reader does."""
        written = self.image_entry.get(IMAGE_FOLDER_FIELD)
        if not isinstance(written, str):
            return None
        path = os.path.expanduser(expand_placeholders(written))
        folder: Path = self.dataset_file.parent / path
        return folder.resolve() if folder.is_dir() else (self.cwd / path).resolve()

    def _merged_options(self, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return every option that is not at its default, without those that no longer apply."""
        given = {
            name: value for name, value in self.chosen_options.items() if name in all_options()
        }
        answered = {name: value for name, value in self.answers.items() if name in all_options()}
        options = {
            **self._propose_options(),
            **self.existing_options,
            **answered,
            **(more or {}),
            **given,
        }
        captions = self.dataset_summary.caption_coverage if self.dataset_summary else "all"

        def known(name: str) -> Any:
            return (
                captions if name == "captions" else options.get(name, all_options()[name].default)
            )

        for question in QUESTIONS:
            ours = question.name not in self.existing_options or question.required_values.get(
                "model_type"
            ) == ("lora",)
            if (
                question.name in options
                and question.name not in given
                and ours
                and not question.applies(known)
            ):
                del options[question.name]
        return options

    def _try_load(self, more: Mapping[str, Any]) -> ConfigLoadResult:
        return try_load_mapping(
            expand_placeholders(self._merged_options(more)), self.target_file.parent, self.cwd
        )

    def _propose_options(self) -> dict[str, Any]:
        """Return proposals for a new file; for an existing one only what another model needs."""
        known_options = {**self.existing_options, **self.answers, **self.chosen_options}
        flavour = known_options.get("model_flavour")
        if flavour is None:
            flavour = "base" if self.is_editing or self._largest_accelerator() else "nano"
        proposal: dict[str, Any] = {} if self.is_editing else {"model_flavour": flavour}
        if flavour == "nano" and self.existing_options.get("model_flavour") != "nano":
            proposal = dict(NANO_PRESET)
            if known_options.get("model_type") == "full":
                del proposal["learning_rate"]  # a LoRA's
        elif not self.is_editing:
            proposal |= self._propose_for_images(int(known_options.get("train_batch_size", 1)))
            proposal |= (
                FULL_RANK_PRESET
                if known_options.get("model_type") == "full"
                else self._propose_for_device(known_options)
            )
        if self.is_editing:
            return proposal
        usual = self.target_file.parent in (self.cwd, self.cwd / "config")
        pictures = self.dataset_summary.folder.name if self.dataset_summary else "chroma"
        proposal["output_dir"] = f"output/{pictures if usual else self.target_file.parent.name}"
        if self.dataset_summary is not None and self.dataset_summary.caption_coverage != "all":
            proposal["caption_strategy"] = (
                "textfile" if self.dataset_summary.captioned_count else "instanceprompt"
            )
            proposal["missing_caption"] = "drop"
            proposal["instance_prompt"] = pictures
        proposal["validation_prompt"] = (
            self.dataset_summary.example_caption if self.dataset_summary else None
        )
        return proposal

    def _propose_for_images(self, batch: int) -> dict[str, Any]:
        if self.dataset_summary is None:
            return {}
        steps = round(VISITS_PER_IMAGE * len(self.dataset_summary.sizes_px) / batch, -2)
        side = self.dataset_summary.median_side_px
        resolution = 1024 if side >= 900 else 768 if side >= 700 else 512
        return {
            "resolution": resolution,
            "max_train_steps": int(min(STEP_LIMITS[1], max(STEP_LIMITS[0], steps))),
        }

    def _propose_for_device(self, known_options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the preset that fits, or the next one if the plan needs more than the preset."""
        device = self._largest_accelerator()
        if device is None:
            return {}
        row, gb = preset_for_memory(device.memory_total_bytes)
        precision = row["base_model_precision"]
        planned = self._plan.finished_gb("base_model_precision", precision, NO_CHANGE)
        if planned is not None:
            more, total = planned - gb, (device.memory_total_bytes or 0) / GB
            fitting = (each for each, size in MEMORY_PRESETS if size <= gb and size + more <= total)
            row = next(fitting, MEMORY_PRESETS[-1][0])
            precision = row["base_model_precision"]
        if known_options.get("base_model_precision", precision) != precision:
            return {"base_model_precision": precision}
        hosted = device.kind != "mps" and known_options.get("gradient_checkpointing") is not False
        return {name: value for name, value in row.items() if hosted or name.endswith("precision")}

    def _largest_accelerator(self) -> DeviceInfo | None:
        """Return the largest accelerator, None without one."""
        cards = [device for device in self._device_detection.result() if device.kind != "cpu"]
        return max(cards, key=lambda device: device.memory_total_bytes or 0, default=None)

    def _describe_hardware(self) -> str:
        device, planned = self._largest_accelerator(), self._planned_memory_gb()
        size = (device.memory_total_bytes or 0) / GB if device else 0.0
        device_text = f"Found {device.name}, {size:.1f} GB." if device else "No GPU found."
        precision = self.proposed_value("base_model_precision")
        if planned is not None:
            base = "unquantized base" if precision == NO_CHANGE else f"{precision} base"
            where = "" if device else " on CPU"
            return f"{device_text} Estimated memory{where} ({base}): {planned:.1f} GB."
        if device is None and self.current_value("model_flavour") != "nano":
            return (
                f"{device_text} Chroma's 8.9 billion weights are too large for a CPU; the nano "
                "flavour runs on one."
            )
        if device is None or self.current_value("model_type") == "full":
            return f"{device_text} The memory estimate is not ready."
        gb = preset_for_memory(device.memory_total_bytes)[1]
        table = f"{gb:.1f} GB with {precision} for rank 16, 1024 px, batch 1"
        return f"{device_text} The memory estimate is not ready; the preset needs {table}."

    def _start_plan(self) -> None:
        loaded = self._try_load({}).loaded
        if loaded is None:
            return
        options = resolved_options(loaded.config)
        device = self._largest_accelerator()
        kind = "cpu" if device is None else "cuda" if device.kind == "rocm" else device.kind
        given = {name: value for name, value in options.items() if value is not None}
        self._plan.start(given, kind)

    def _planned_memory_gb(self) -> float | None:
        """Return the planned GB of the current values, None if no plan is ready."""
        if not self.prompter.interactive:
            return None
        self._start_plan()
        return self._plan.wait_gb()


def _detect_devices() -> list[DeviceInfo]:
    from simpletuner.server.hardware import list_devices

    return list_devices()

"""Checks before a run is started that need the images of the datasets or the hardware.

The training itself would find some of these problems only after it was started, and others never:
weeks of training on a CPU are no error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner.config.load import LoadedConfig
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ImageSize, bucket_size
from simpletuner.errors import DataError
from simpletuner.events.formatting import count_of
from simpletuner.server.config_validation import (
    PROMPT_OPTIONS,
    canonical_name,
    read_and_validate,
)
from simpletuner.server.dataset_items import ALIGNMENT_PX
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.job_config import run_folder_name
from simpletuner.server.schemas.base import ErrorDetail
from simpletuner.server.schemas.configs import ConfigValidationResult
from simpletuner.server.schemas.system import DeviceInfo
from simpletuner.server.workspace import Workspace

CPU_FLAVOUR = "nano"  # the only flavour that a CPU trains in minutes
MAX_SUGGESTED_CAPTIONS = 4
MAX_NAMED_FILES = 3


class StartChecks:
    """Validates configurations together with their datasets and the hardware.

    devices: returns the accelerators of this machine, or its CPU.
    """

    def __init__(
        self,
        workspace: Workspace,
        datasets: DatasetService,
        devices: Callable[[], Sequence[DeviceInfo]],
    ) -> None:
        self._workspace = workspace
        self._datasets = datasets
        self._devices = devices

    def check(
        self, config: Mapping[str, Any], datasets: Sequence[Any], name: str = ""
    ) -> ConfigValidationResult:
        """Return the result of validate_config with further problems and warnings."""
        validated = read_and_validate(self._workspace, config, datasets)
        result, loaded = validated.result, validated.loaded
        update: dict[str, Any] = {"run_dir": self._run_dir(config, name)}
        if loaded is not None:
            images = (*validated.datasets.train, *validated.datasets.eval)
            update["problems"] = [*result.problems, *self._caption_problems(loaded.config, images)]
            update["warnings"] = [*self._hardware_warnings(loaded), *_prompt_warnings(loaded)]
            update["captions"] = self._suggest_captions(validated.datasets.train)
        return result.model_copy(update=update)

    def largest_bucket(
        self, config: Mapping[str, Any], datasets: Sequence[Any]
    ) -> ImageSize | None:
        """Return the largest size in px that the images of the datasets are trained at.

        None if no image is known.
        """
        buckets: set[ImageSize] = set()
        for dataset in read_and_validate(self._workspace, config, datasets).datasets.train:
            with contextlib.suppress(DataError):
                sizes = self._datasets.image_sizes(dataset.instance_data_dir)
                buckets |= {bucket_size(dataset.resize_crop, size, ALIGNMENT_PX) for size in sizes}
        return max(buckets, key=lambda size: size[0] * size[1], default=None)

    def _run_dir(self, config: Mapping[str, Any], name: str) -> str:
        given = {canonical_name(key): value for key, value in config.items()}.get("output_dir")
        if isinstance(given, str) and given.strip():
            return str(self._workspace.resolve_or_none(given) or "")
        return str(self._workspace.output_dir / run_folder_name(name)) if name.strip() else ""

    def _caption_problems(
        self, config: RunConfig, datasets: Sequence[DatasetConfig]
    ) -> Iterator[ErrorDetail]:
        """Yield a problem for each dataset with images that have no caption.

        Only .txt files are looked for: what other strategies need, the training checks itself.
        """
        if config.data.missing_caption != "error":
            return
        for dataset in datasets:
            reads_files = dataset.caption_strategy == "textfile" and dataset.type == "local"
            if not reads_files or dataset.only_instance_prompt:
                continue
            files = self._uncaptioned(dataset.instance_data_dir)
            if files:
                shown = ", ".join(files[:MAX_NAMED_FILES])
                more = ", ..." if len(files) > MAX_NAMED_FILES else ""
                have = "has" if len(files) == 1 else "have"
                message = (
                    f"{count_of(len(files), 'image')} {have} no caption ({shown}{more}). Write the "
                    "missing captions on the page of the dataset, or set missing_caption to empty, "
                    "filename or drop"
                )
                yield ErrorDetail(loc=dataset.id, message=message)

    def _uncaptioned(self, folder: Path) -> list[str]:
        try:
            return self._datasets.uncaptioned_files(folder)
        except DataError:  # a folder that cannot be read is reported by the validation
            return []

    def _hardware_warnings(self, loaded: LoadedConfig) -> Iterator[ErrorDetail]:
        flavour, device = loaded.config.model.model_flavour, loaded.config.model.device
        no_gpu = all(hardware.kind == "cpu" for hardware in self._devices())
        if flavour == CPU_FLAVOUR or not (device == "cpu" or (device == "auto" and no_gpu)):
            return
        why = "device is cpu" if device == "cpu" else "this machine has no GPU"
        message = (
            f"{why}: training {flavour} would take weeks. Only the bundled model (model_flavour "
            f"{CPU_FLAVOUR}) is practical on a CPU"
        )
        yield ErrorDetail(loc="model_flavour", message=message)

    def _suggest_captions(self, datasets: Sequence[DatasetConfig]) -> list[str]:
        captions: dict[str, None] = {}
        for dataset in datasets:
            try:
                texts = self._datasets.some_captions(dataset.instance_data_dir)
            except DataError:
                continue
            captions |= dict.fromkeys(texts)
        return list(captions)[:MAX_SUGGESTED_CAPTIONS]


def _prompt_warnings(loaded: LoadedConfig) -> Iterator[ErrorDetail]:
    options = loaded.config.validation
    has_prompts = any(vars(options)[name] for name in PROMPT_OPTIONS)
    if not has_prompts and not options.validation_disable:
        message = (
            "there is no prompt, so no validation images are generated and the progress can only "
            "be judged by the loss"
        )
        yield ErrorDetail(loc="validation_prompt", message=message)

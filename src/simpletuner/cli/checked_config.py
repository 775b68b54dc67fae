"""The checks of a configuration together with the files that it names, before torch is imported.

What most configurations do not ask for is imported only where they do: a mistake in an option is
reported in a fraction of a second.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.config.constraints import FP16_REFUSAL
from simpletuner.config.deepspeed_config import uses_deepspeed
from simpletuner.config.load import ConfigLoadResult, LoadedConfig
from simpletuner.config.output_folder import find_output_dir_problems
from simpletuner.config.schema import RunConfig
from simpletuner.config.tuning_constraints import NO_HELD_OUT_IMAGES
from simpletuner.data.address_schemes import store_problem
from simpletuner.errors import ConfigError, MissingExtra, Problem

if TYPE_CHECKING:
    from simpletuner.data.dataset_config import DatasetFile


def require_extras(loaded: LoadedConfig) -> None:
    """Raise MissingExtra if the run needs DeepSpeed and it is not installed."""
    if uses_deepspeed(loaded.config) and find_spec("deepspeed") is None:
        raise MissingExtra("deepspeed_config needs: pip install 'simpletuner[deepspeed]'")


def require_config_and_datasets(tried: ConfigLoadResult) -> tuple[LoadedConfig, DatasetFile]:
    """Return the configuration and its datasets.

    Raises ConfigError with the problems of all files together.
    """
    problems = list(tried.problems)
    backends = None
    if tried.data_options is not None and tried.data_options.data_backend_config is not None:
        from simpletuner.data.dataset_file import read_dataset_file

        try:
            backends = read_dataset_file(
                Path(tried.data_options.data_backend_config),
                tried.data_options,
                output_dir=tried.loaded.config.training.output_dir if tried.loaded else "",
            )
        except ConfigError as error:
            problems.extend(error.problems)
    if tried.loaded is not None:
        problems += _problems_of_files(tried.loaded)
        if backends is not None:
            problems += _problems_between(tried.loaded, backends)
    if problems or tried.loaded is None or backends is None:
        raise ConfigError(problems)
    return tried.loaded, backends


def _problems_of_files(loaded: LoadedConfig) -> list[Problem]:
    """Return the first problem of the files of validation and webhooks, and that of fp16."""
    run, source = loaded.config, loaded.config_path
    problems = []
    if run.model.mixed_precision == "fp16":
        problems.append(Problem(loaded.origins["mixed_precision"], FP16_REFUSAL))
    try:
        from simpletuner.validation.prompts import read_prompts

        read_prompts(run.validation, source.parent if source else Path.cwd())
        if run.validation.validation_image is not None:
            from simpletuner.data.start_image import read_size

            read_size(Path(run.validation.validation_image), loaded.origins["validation_image"])
        if run.logging.webhook_config is not None:
            from simpletuner.events.webhook_sink import parse_webhook_config

            parse_webhook_config(run.logging.webhook_config)
    except ConfigError as error:
        problems.extend(error.problems)
    return [*problems, *_problems_of_caches(loaded)]


def _problems_of_caches(loaded: LoadedConfig) -> list[Problem]:
    """Return what is wrong with the places of the caches."""
    caches, problems = loaded.config.cache, []
    if caches.cache_dir is not None and ":/" in caches.cache_dir:
        text = "cache_dir: caches are files of this machine; cache_remote is for an address"
        problems.append(Problem(loaded.origins["cache_dir"], text))
    if caches.cache_remote is not None and (reason := store_problem(caches.cache_remote)):
        shown = json.dumps(caches.cache_remote, ensure_ascii=False)
        text = f"cache_remote = {shown}: {reason}"
        problems.append(Problem(loaded.origins["cache_remote"], text))
    return problems


def _problems_between(loaded: LoadedConfig, backends: DatasetFile) -> list[Problem]:
    """Return where the configuration and the datasets contradict each other."""
    from simpletuner.data.regularisation import regularisation_problems

    run = loaded.config
    return [
        *output_dir_problems(loaded, backends),
        *noise_level_problems(run, backends),
        *early_stopping_problems(loaded, backends),
        *regularisation_problems(run.model.model_type, backends.train),
    ]


def output_dir_problems(loaded: LoadedConfig, backends: DatasetFile) -> list[Problem]:
    """Return why the run may not use its output_dir."""
    run = loaded.config
    caches = [run.cache.cache_dir, backends.text_cache_dir]
    messages = find_output_dir_problems(
        Path(os.path.expanduser(run.training.output_dir)).absolute(),
        {
            dataset.id: dataset.instance_data_dir
            for dataset in (*backends.train, *backends.eval)
            if dataset.has_folder
        },
        loaded.config_path,
        [Path(cache) for cache in caches if cache],
    )
    return [Problem(loaded.origins["output_dir"], text) for text in messages]


def early_stopping_problems(loaded: LoadedConfig, backends: DatasetFile) -> list[Problem]:
    """Return that nothing can be held out, where validation_split says so and no dataset is."""
    tuning = loaded.config.tuning
    splits = tuning.validation_split != 0 or tuning.validation_fold is not None
    if not tuning.early_stopping or splits or backends.eval:
        return []
    return [Problem(loaded.origins["early_stopping"], NO_HELD_OUT_IMAGES)]


def noise_level_problems(run: RunConfig, backends: DatasetFile) -> list[Problem]:
    """Return which datasets move noise levels of a list, which cannot be moved."""
    flow = run.flow
    if flow.flow_custom_timesteps is None and not flow.flux_fast_schedule:
        return []
    name = "flux_fast_schedule" if flow.flow_custom_timesteps is None else "flow_custom_timesteps"
    return [
        Problem(
            str(run.data.data_backend_config),
            f"{dataset.id}.timestep_sampling_offset moves a density of noise levels, and {name} is "
            "a list of them; leave out one of the two",
        )
        for dataset in backends.train
        if dataset.timestep_sampling_offset
    ]

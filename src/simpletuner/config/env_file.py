"""config.env: SimpleTuner's oldest form of a configuration, lines of KEY=value as in a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from simpletuner.config.flags import parse_flags
from simpletuner.config.jsonc import Document, JsonPath
from simpletuner.errors import ConfigError, Problem

LINE_PATTERN = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)")
EXTRA_ARGUMENTS = "TRAINER_EXTRA_ARGS"
# Variables whose names are not those of the options. Any other name is that of an option.
OPTION_OF_VARIABLE: Mapping[str, str] = {
    "ACCELERATE_CONFIG_PATH": "accelerate_config",
    "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
    "DATALOADER_CONFIG": "data_backend_config",
    "HUB_MODEL_NAME": "hub_model_id",
    "LR_SCHEDULE": "lr_scheduler",
    "MAX_NUM_STEPS": "max_train_steps",
    "MINIMUM_RESOLUTION": "minimum_image_size",
    "MODEL_NAME": "pretrained_model_name_or_path",
    "NUM_EPOCHS": "num_train_epochs",
    "PUSH_CHECKPOINTS": "push_checkpoints_to_hub",
    "RESUME_CHECKPOINT": "resume_from_checkpoint",
    "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
    "TRAINING_NUM_MACHINES": "num_machines",
    "TRAINING_NUM_PROCESSES": "num_processes",
    "TRAINING_SEED": "seed",
    "VALIDATION_NUM_INFERENCE_STEPS": "validation_num_inference_steps",
}
# Variables of other programs, which belong in the environment. They are reported and not set.
FOREIGN_VARIABLE_PATTERN = re.compile(
    r"(HF|HUGGINGFACE|WANDB|CUDA|NCCL|PYTORCH|TORCH|TOKENIZERS|OMP|AWS|MASTER|DISABLE|TF)_\w+|PATH"
)


def parse_env_file(text: str, name: str) -> Document:
    """Parse KEY=value lines; values may be quoted, and # starts a comment.

    Empty values are left out. TRAINER_EXTRA_ARGS holds options as on the command line. Raises
    ConfigError with the place of the first line that is not in this form.
    """
    value: dict[str, Any] = {}
    positions: dict[JsonPath, tuple[int, int]] = {(): (1, 1)}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE_PATTERN.fullmatch(line)
        try:
            words = shlex.split(match[2], comments=True) if match else []
            is_extra = match is not None and match[1] == EXTRA_ARGUMENTS
            extra = shlex.split(" ".join(words)) if is_extra else []
        except ValueError as error:
            raise ConfigError([Problem(f"{name}:{number}", str(error))]) from None
        if match is None or (len(words) > 1 and not is_extra):
            message = 'is not a line such as LEARNING_RATE=1e-4 or PROMPT="a cat"'
            raise ConfigError([Problem(f"{name}:{number}", message)])
        given: dict[str, Any] = {}
        if is_extra:
            pairs = parse_flags(extra)
            given = {key: True if raw is None else raw for key, raw in pairs}
        elif words and words[0].strip():
            given = {_option_name(match[1]): words[0]}
        for key, raw in given.items():
            value[key] = raw
            positions[key,] = (number, match.start(1) + 1)
    return Document(value, positions, name)


def _option_name(variable: str) -> str:
    if FOREIGN_VARIABLE_PATTERN.fullmatch(variable):
        return variable
    return OPTION_OF_VARIABLE.get(variable.upper(), variable.lower())

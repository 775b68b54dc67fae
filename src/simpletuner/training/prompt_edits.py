"""Validation prompts that a user edits while the run trains, from the next validation on.

control/prompts.json in the run folder holds the whole list, in the format of user_prompt_library.
It is read before each validation, and stays there, so that a resumed run uses it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from simpletuner.config.schema import RunConfig
from simpletuner.errors import CacheError, ConfigError, DataError
from simpletuner.events.event_types import Emit, PromptsChosen, WarningIssued
from simpletuner.peers import ALONE
from simpletuner.training.caption_encoding import encode_captions, free_memory
from simpletuner.training.device import ComputeDevice, describe_out_of_memory
from simpletuner.training.prepare import PreparedInputs
from simpletuner.training.run_folder import EDITED_PROMPTS, RunFolder
from simpletuner.training.validation_starts import plan_validation_images, validation_seed
from simpletuner.training.world import World
from simpletuner.validation.image_validator import ImageValidator
from simpletuner.validation.prompts import Prompt, parse_edited_prompts, parse_sizes, prompt_texts


@dataclass
class PromptEdits:
    """Gives the validator the prompts that a user has edited.

    prompts: those in use. A list that cannot be used is reported once, and the prompts before it
    stay. The text encoder is loaded only for texts that are not in the cache, by the main process.
    """

    run: RunConfig
    prepared: PreparedInputs
    device: ComputeDevice
    folder: RunFolder
    validator: ImageValidator
    prompts: tuple[Prompt, ...]
    world: World
    emit: Emit
    _seen: tuple[str | None, str] = field(default=(None, ""), init=False)

    def update(self, step: int) -> None:
        """Take up the prompts in the run folder, where they are others than before."""
        text, problem = self.world.broadcast_json(self._read() if self.world.is_main else None)
        if (text, problem) == self._seen:
            return
        self._seen = text, problem
        prompts = self.prompts
        negative = self.run.validation.validation_negative_prompt
        if text is not None:
            try:
                prompts = parse_edited_prompts(text, EDITED_PROMPTS, negative)
            except ConfigError as error:
                problem = str(error)
        if prompts != self.prompts:
            own = self._encode(prompts) if self.world.is_main else ""
            problem = self.world.broadcast_json(own)
        if problem:
            message = "the edited validation prompts are not used, and those before them stay"
            self.emit(WarningIssued(f"{message}: {problem}"))
        elif prompts != self.prompts:
            if not self.world.is_main:
                self.prepared.text_cache.adopt_new_shards()
            self._use(prompts)
            self.emit_prompts(step, edited=True)

    def _read(self) -> tuple[str | None, str]:
        """Return the text of the edits, None without any, and why it cannot be read."""
        try:
            return self.folder.read_edited_prompts(), ""
        except ConfigError as error:
            return None, str(error)

    def emit_prompts(self, step: int, edited: bool) -> None:
        """Emit the prompts in use."""
        prompts = self.prompts
        rows = [(prompt.id, prompt.text, prompt.negative, prompt.seed) for prompt in prompts]
        sizes = tuple(prompt.size for prompt in prompts)
        strengths = tuple(prompt.strength for prompt in prompts)
        self.emit(
            PromptsChosen(
                step,
                tuple(rows),
                edited,
                sizes if any(sizes) else (),
                strengths if set(strengths) != {1.0} else (),
            )
        )

    def _use(self, prompts: tuple[Prompt, ...]) -> None:
        run, alignment_px = self.run, self.prepared.constants.alignment_px
        sizes, _ = parse_sizes(run.validation.validation_resolution, run.data, alignment_px)
        specs, start_of = plan_validation_images(
            run, self.prepared, prompts, sizes, validation_seed(run), self.device.device
        )
        self.prompts = prompts
        self.validator.image_specs, self.validator.start_of = specs, start_of

    def _encode(self, prompts: Sequence[Prompt]) -> str:
        """Encode the texts that are not cached; return why that is not possible, or "".

        Only errors that leave the training as it was are caught: texts that are refused, and too
        little memory for the encoder next to the network.
        """
        prepared, run = self.prepared, self.run
        texts = prompt_texts(prompts, run.validation.validation_guidance_real)
        try:
            encode_captions(
                run,
                prepared.family,
                prepared.model_files,
                prepared.constants.max_tokens,
                prepared.text_cache,
                texts,
                self.device,
                ALONE,
                self.emit,
            )
        except (DataError, CacheError) as error:
            return str(error)
        except (RuntimeError, MemoryError) as error:
            shortage = describe_out_of_memory(error)
            if shortage is None:
                raise
            problem = f"the text encoder does not fit next to the network ({shortage})"
        else:
            return ""
        free_memory(self.device)  # after the except block, which holds the encoder's frames
        return problem

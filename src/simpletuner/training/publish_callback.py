"""The model card of a run, and with push_to_hub the uploads, as a callback of the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.training.model_card import write_model_card
from simpletuner.training.model_metadata import RunMetadata

if TYPE_CHECKING:  # the client of the hub takes long to import, and most runs do not upload
    from simpletuner.training.hub_publisher import HubPublisher


@dataclass(frozen=True)
class PublishCallback:
    """Publishes the LoRA of each checkpoint and, at the end, the model card and the weights.

    publisher: None writes the model card only.
    """

    run_metadata: RunMetadata
    publisher: HubPublisher | None
    stop_requested: Callable[[], bool]

    def publish_checkpoint(self, step: int) -> None:
        folder = self.run_metadata.run_dir / f"checkpoint-{step}"
        if self.publisher is not None:
            self.publisher.enqueue(
                sorted(folder.rglob("pytorch_lora_weights*.safetensors")), folder.name
            )

    def publish_final(self, step: int) -> None:
        write_model_card(self.run_metadata.run_dir, self.run_metadata, step)
        if self.publisher is not None:
            self.publisher.publish_results(step, self.stop_requested)

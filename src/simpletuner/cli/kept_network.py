"""The parts of a model that stay in memory between requests for images."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.cache.batch_types import TextEmbedding
    from simpletuner.config.schema import ModelOptions
    from simpletuner.validation.sampling_preview import RgbProjection

T = TypeVar("T")
MAX_EMBEDDINGS = 200


class KeptNetwork:
    """Holds at most one transformer, and drops it where something else needs the memory."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._transformer: nn.Module | None = None
        self._model: ModelOptions | None = None
        self._embeddings: dict[str, TextEmbedding] = {}
        self._projection: tuple[ModelOptions, RgbProjection] | None = None

    def transformer(self, key: tuple[object, ...], load: Callable[[], nn.Module]) -> nn.Module:
        """Return the transformer of `key`: the one in memory, or that which `load` returns."""
        if self._transformer is None or self._key != key:
            self.drop()
            self._transformer, self._key = load(), key
        return self._transformer

    def embeddings(
        self,
        model: ModelOptions,
        texts: Sequence[str],
        encode: Callable[[Sequence[str]], Sequence[TextEmbedding]],
    ) -> dict[str, TextEmbedding]:
        """Return the embedding of each text; the text encoder is used only for new ones."""
        if self._model != model or len(self._embeddings) > MAX_EMBEDDINGS:
            self._embeddings, self._model = {}, model
        new = [text for text in texts if text not in self._embeddings]
        if new:
            encoded = self.make_room_for(lambda: encode(new))
            self._embeddings |= dict(zip(new, encoded, strict=True))
        return {text: self._embeddings[text] for text in texts}

    def projection(self, model: ModelOptions, fit: Callable[[], RgbProjection]) -> RgbProjection:
        """Return the map from latents to colours of the model's VAE; `fit` is called once."""
        if self._projection is None or self._projection[0] != model:
            self._projection = model, self.make_room_for(fit)
        return self._projection[1]

    def make_room_for(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, after the transformer is dropped if memory runs out."""
        from simpletuner.training.device import describe_out_of_memory

        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if self._transformer is None or describe_out_of_memory(error) is None:
                raise
        # After the handler, whose exception refers to the tensors of the failed call.
        self.drop()
        return work()

    def drop(self) -> None:
        """Release the transformer."""
        self._transformer = self._key = None
        gc.collect()  # a reference cycle may keep the network

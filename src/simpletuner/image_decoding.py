"""One place where whatever an image decoder raises becomes one exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UndecodableImage(Exception):
    """An image file that cannot be decoded; __cause__ is what the decoder raised."""


@contextmanager
def decoder_errors(*passed: type[Exception]) -> Iterator[None]:
    """Raise UndecodableImage for every exception except those of the classes `passed`.

    Pillow's decoders raise OSError, SyntaxError, ValueError, RuntimeError (AVIF), struct.error,
    zlib.error, MemoryError and more for damaged files. A list of classes is never complete, and one
    damaged file among thousands must not end a training or a request.
    """
    try:
        yield
    except passed:
        raise
    except Exception as error:
        raise UndecodableImage(str(error) or type(error).__name__) from error

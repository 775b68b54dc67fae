"""Headers of images: read from the file, remembered, or taken from the row of a table."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from simpletuner.data.duplicates import content_hash
from simpletuner.data.file_facts import FileFacts
from simpletuner.data.image_files import ImageFile
from simpletuner.data.pixels import ImageHeader, check_pixel_count, read_image_header
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.sources import SourceFile


class HeaderReader:
    """Reader of headers. A slow file is read at most once, and not at all in later starts.

    facts: of the slow files that were read. May be used from many threads.
    """

    def __init__(self, max_megapixels: float, store: RemoteStore | None) -> None:
        self._max_megapixels = max_megapixels
        self._store = store
        self._lock = threading.Lock()
        self.facts: dict[SourceFile, FileFacts] = {}

    @contextmanager
    def remembered(self, images: Sequence[ImageFile]) -> Iterator[HeaderReader]:
        """Look up what is remembered of these images; remember the new ones."""
        slow = [
            image.file
            for image in images
            if image.file.is_slow and (image.row is None or image.row.size_px is None)
        ]
        if self._store is None or not slow:
            yield self
            return
        index = self._store.index
        known = index.find_facts(slow)
        with self._lock:
            self.facts |= known
        yield self
        with self._lock:
            new = {file: self.facts[file] for file in slow if file in self.facts}
        index.remember_facts({file: fact for file, fact in new.items() if file not in known})

    def read(self, image: ImageFile) -> ImageHeader:
        """Return the header. Raises UnusableFile."""
        if not image.file.is_slow:
            return read_image_header(image.file, self._max_megapixels)
        with self._lock:
            facts = self.facts.get(image.file)
        if facts is None and image.row is not None and image.row.size_px is not None:
            check_pixel_count(image.row.size_px, self._max_megapixels)
            # The file itself is not downloaded for this; mode and alpha show when it is decoded.
            return ImageHeader(image.row.size_px, "RGB", False, False)
        if facts is None:
            facts = self._read_facts(image.file)
        check_pixel_count(facts.size_px, self._max_megapixels)
        return ImageHeader(facts.size_px, facts.mode, facts.is_animated, facts.has_alpha)

    def _read_facts(self, file: SourceFile) -> FileFacts:
        header = read_image_header(file, self._max_megapixels)
        try:
            # While the copy is on this machine: it may be deleted, and duplicates compare hashes
            # later.
            digest, size_bytes = content_hash(file), file.size_bytes()
        except OSError as error:
            raise UnusableFile("unreadable", f"cannot be read: {error.strerror}") from error
        facts = FileFacts(
            digest,
            size_bytes,
            header.size_px,
            header.mode,
            header.is_animated,
            header.has_alpha,
        )
        with self._lock:
            self.facts[file] = facts
        return facts

"""Files whose names only a UTF-8 locale can write."""

from __future__ import annotations

import sys

import pytest

needs_unicode_names = pytest.mark.skipif(
    sys.getfilesystemencoding() != "utf-8",
    reason="NOT TESTED, Unicode file names: the encoding of this locale has no such characters",
)

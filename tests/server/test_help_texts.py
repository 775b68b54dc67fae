"""Every option and dataset field is explained in each language of the pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.config.option_catalog import all_options
from simpletuner.data.dataset_fields import COMMON_FIELDS, IMAGE_FIELDS

CATALOGUES = Path(__file__).parents[2] / "web" / "src" / "i18n" / "options"


def wanted() -> set[str]:
    """The key of a dataset field has a prefix unless the run has the same option."""
    options, fields = all_options(), {**COMMON_FIELDS, **IMAGE_FIELDS}
    own = {
        f"dataset.{name}"
        for name, field in fields.items()
        if name not in options or options[name].text != field.text
    }
    return set(options) | own


@pytest.mark.parametrize("language", ["es", "hi"])
def test_no_help_text_is_missing(language: str) -> None:
    texts = json.loads((CATALOGUES / f"{language}.json").read_text(encoding="utf-8"))
    assert sorted(wanted() - set(texts)) == [], f"translate them in {language}.json"
    assert sorted(set(texts) - wanted()) == [], "these options do not exist"
    english = {option.text for option in all_options().values()}
    assert [name for name, text in texts.items() if not text.strip() or text in english] == []

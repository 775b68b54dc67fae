"""Writer of docs/options.md and docs/options.schema.json: python -m simpletuner.config.docs."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from simpletuner.config.option_catalog import Option, all_options
from simpletuner.config.schema import RunConfig
from simpletuner.config.unsupported_options import is_noted, unsupported_names_by_reason

PAGE_HEADER = """# Options

Written by `python -m simpletuner.config.docs`; do not edit. One option is one key of `config.json`,
one flag (`--seed 7`, `--seed=7` or `seed=7`) and one variable (`SIMPLETUNER_SEED=7`). Later sources
replace earlier ones: default, file, environment, flag. Start with the **basic** options, then the
*common* ones. Options marked R may change between a checkpoint and its resumption. An option that
"needs" values of others has no effect without them: the web form hides it, and a notice names it.
"""

UNSUPPORTED_HEADER = """
## Options of SimpleTuner that are not supported

Setting one is an error. It is skipped with a notice if it is off, at SimpleTuner's default, or
without effect. Those marked N are never an error: a notice gives the reason.

| option | reason or replacement |
|---|---|"""


# What `option(...)` adds to pydantic's JSON schema and what no editor needs.
OMITTED_SCHEMA_KEYS = {
    "title",
    "needs_any",
    *(field.name for field in dataclasses.fields(Option) if field.name not in ("default", "unit")),
}


def render_options_page() -> str:
    """Return the text of docs/options.md."""
    parts = [PAGE_HEADER]
    for group, options in groupby(all_options().values(), key=lambda option: option.group):
        parts.append(f"\n## {group}\n\n| option | takes | default | |\n|---|---|---|---|")
        parts.extend(_render_row(option) for option in options)
    parts.append(UNSUPPORTED_HEADER)
    parts.extend(
        f"| {', '.join(f'`{name}`{_mark(name)}' for name in names)} | {reason} |"
        for reason, names in unsupported_names_by_reason()
    )
    return "\n".join(parts) + "\n"


def _mark(name: str) -> str:
    return " N" if is_noted(name) else ""


def _render_row(option: Option) -> str:
    mark = {"basic": f"**`{option.name}`**", "common": f"*`{option.name}`*"}.get(
        option.level, f"`{option.name}`"
    )
    also = (
        f" Also written {', '.join(f'`{alias}`' for alias in option.aliases)}."
        if option.aliases
        else ""
    )
    needs = f" Needs {option.needs_text}." if option.needs else ""
    unit = f" ({option.unit})" if option.unit else ""
    cells = [
        mark + (" R" if option.resume_policy == "free" else ""),
        option.takes + unit,
        f"`{json.dumps(option.default)}`",
        option.text + needs + also,
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def build_json_schema() -> dict[str, Any]:
    """Return docs/options.schema.json, which editors use through a "$schema" key in config.json."""
    properties: dict[str, Any] = {"$schema": {"type": "string"}}
    for section in RunConfig.model_json_schema()["$defs"].values():
        for name, shape in section["properties"].items():
            option = all_options()[name]
            declared = {key: shape[key] for key in shape if key not in OMITTED_SCHEMA_KEYS}
            if not option.nullable:
                description = declared.pop("description")
                declared = {"description": description, "anyOf": [declared, {"type": "null"}]}
            properties.update(dict.fromkeys((name, *option.aliases), declared))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "simpletuner config",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def write_option_docs(folder: Path) -> None:
    """Write both files."""
    folder.mkdir(exist_ok=True)
    (folder / "options.md").write_text(render_options_page(), encoding="utf-8")
    schema = json.dumps(build_json_schema(), indent=1, ensure_ascii=False)
    (folder / "options.schema.json").write_text(schema + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_option_docs(Path("docs"))

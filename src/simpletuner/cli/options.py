"""simpletuner options: search the options by word."""

from __future__ import annotations

import json

import click

from simpletuner.config.option_catalog import Option, all_options
from simpletuner.config.option_values import did_you_mean
from simpletuner.config.unsupported_options import unsupported_reason
from simpletuner.errors import ConfigError


@click.command("options")
@click.argument("word", required=False)
def command(word: str | None) -> None:
    """Search the options by name and help text. Without WORD, list the names by group."""
    sought = (word or "").lower().lstrip("-").replace("-", "_")
    matches = [
        option
        for option in all_options().values()
        if sought in " ".join((option.name, *option.aliases))
    ]
    matches = matches or [
        option for option in all_options().values() if (word or "").lower() in option.text.lower()
    ]
    if not word:
        names: dict[str, list[str]] = {}
        for option in matches:
            names.setdefault(option.group, []).append(option.name)
        for group, members in names.items():
            click.echo(f"{group}\n  {chr(10).join(members).replace(chr(10), chr(10) + '  ')}\n")
        return
    for option in matches:
        click.echo(format_option(option))
    reason = unsupported_reason(sought)
    if reason:
        click.echo(f"{sought} is not an option here: {reason}")
    elif not matches:
        raise ConfigError(f"no option matches {word!r}{did_you_mean(sought, all_options())}")


def format_option(option: Option) -> str:
    """Return a few lines about one option."""
    unit = f" ({option.unit})" if option.unit else ""
    lines = [
        option.name,
        f"  {option.text}",
        f"  takes {option.takes}{unit}; default {json.dumps(option.default)}; {option.level}",
    ]
    if option.aliases:
        lines.append(f"  alias {', '.join(option.aliases)}")
    if option.needs:
        lines.append(f"  needs {option.needs_text}")
    lines.append(
        "  may change on resume"
        if option.resume_policy == "free"
        else "  must stay the same on resume"
    )
    return "\n".join(lines)

"""simpletuner publish: a finished run to the hub, when it was not done at its end."""

from __future__ import annotations

from pathlib import Path

import click

from simpletuner.errors import ConfigError, Problem, SimpleTunerError


@click.command("publish")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--repo", help="owner/name, or a name of your own.  [default: the run's hub_model_id or name]")
@click.option("--public", is_flag=True, help="Make a new repository public, or put it into a public one.")
def command(run: Path, repo: str | None, public: bool) -> None:
    """Upload the weights, the card and its pictures of RUN; its configuration and log stay here."""
    from simpletuner.config.jsonc import parse
    from simpletuner.config.load import from_resolved
    from simpletuner.config.schema import PublishingOptions
    from simpletuner.events.wording import describe
    from simpletuner.training.publish import Publisher, limit_s, repository, results

    run, options = run.resolve(), PublishingOptions()
    if (run / "config.json").is_file():
        file = run / "config.json"
        options = from_resolved(parse(file.read_text(encoding="utf-8"), str(file)).value).publishing
    files = results(run)
    if not any(path.suffix == ".safetensors" for path in files):
        raise ConfigError([Problem("publish", f"{run} holds no finished weights; the training writes them")])
    private = options.model_card_private and not public
    publisher = Publisher(
        run, repo or repository(options, run), private, lambda event: click.echo(describe(event), err=True)
    )
    publisher.offer(files, "weights")
    if not publisher.wait(6 * limit_s(files)):
        raise SimpleTunerError(f"{run.name} is not published: {publisher.failed}")
    click.echo(publisher.repo)

"""simpletuner publish: upload a finished run to Hugging Face."""

from __future__ import annotations

from pathlib import Path

import click

from simpletuner.errors import ConfigError, Problem, SimpleTunerError


@click.command("publish")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--repo",
    help=("owner/name, or a name in your account.  [default: the run's hub_model_id or name]"),
)
@click.option(
    "--public", is_flag=True, help="Create a public repository, or allow an existing public one."
)
def command(run: Path, repo: str | None, public: bool) -> None:
    """Upload the weights, the model card and its images of RUN.

    The configuration and the log stay on this machine.
    """
    from simpletuner.config.documents import read_document
    from simpletuner.config.load import config_from_resolved
    from simpletuner.config.schema import PublishingOptions
    from simpletuner.events.formatting import describe_event
    from simpletuner.training.hub_publisher import (
        HubPublisher,
        list_result_files,
        repository_name,
        upload_timeout_s,
    )

    run, options = run.resolve(), PublishingOptions()
    if (run / "config.json").is_file():
        file = run / "config.json"
        options = config_from_resolved(read_document(file, str(file)).value).publishing
    files = list_result_files(run)
    if not any(path.suffix == ".safetensors" for path in files):
        raise ConfigError(
            [
                Problem(
                    "publish",
                    f"{run} has no final weights; they are written at the end of the training",
                )
            ]
        )
    private = options.model_card_private and not public
    publisher = HubPublisher(
        run,
        repo or repository_name(options, run),
        private,
        lambda event: click.echo(describe_event(event), err=True),
    )
    publisher.enqueue(files, "weights")
    if not publisher.wait(6 * upload_timeout_s(files)):
        raise SimpleTunerError(f"{run.name} was not published: {publisher.failure}")
    click.echo(publisher.repo)

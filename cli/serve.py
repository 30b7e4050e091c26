"""`polarcache serve`: its flags are the fields of the service's configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from polarcache.cache_service.config import (
    CONFIG_FILE_VARIABLE,
    ENV_PREFIX,
    ConfigError,
    ServiceConfig,
    load_config,
)

__all__ = ["serve"]

_HELP = f"""Run the cache service until SIGTERM or Ctrl-C.

A setting comes from its flag, else from the variable {ENV_PREFIX}<NAME>, else from the YAML file
that --config or {CONFIG_FILE_VARIABLE} names, else from its default. Unknown settings are errors.
"""


def _options() -> list[click.Option]:
    options = []
    for name, field in ServiceConfig.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        flag = name.replace("_", "-")
        is_switch = isinstance(default, bool)
        options.append(
            click.Option(
                [f"--{flag}/--no-{flag}" if is_switch else f"--{flag}", name],
                default=None,
                help=f"{field.description}  [default: {_shown(default)}]",
                metavar=None if is_switch else "VALUE",
            )
        )
    return options


def _shown(default: object) -> str:
    if hasattr(default, "human_readable"):
        text: str = default.human_readable()
        return text
    return "on" if default is True else "off" if default is False else str(default)


@click.pass_context
def _serve(
    context: click.Context, /, config: Path | None, port_file: Path | None, **flags: Any
) -> None:
    from polarcache.cache_service.logs import set_up_logging
    from polarcache.cache_service.server import run
    from polarcache.proto.errors import PolarCacheError

    if config is not None:
        os.environ[CONFIG_FILE_VARIABLE] = str(config)
    try:
        settings = load_config({name: value for name, value in flags.items() if value is not None})
    except ConfigError as error:
        raise click.UsageError(str(error), context) from error
    set_up_logging(settings.log_level)
    try:
        run(settings, port_file)
    except PolarCacheError as error:
        raise click.ClickException(str(error)) from error


serve = click.Command(
    "serve",
    callback=_serve,
    help=_HELP,
    context_settings={"max_content_width": 100},
    params=[
        click.Option(
            ["--config"],
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="YAML file of settings, by the names of the flags with underscores.",
        ),
        click.Option(
            ["--port-file"],
            type=click.Path(dir_okay=False, path_type=Path),
            help="File to write the port to once the service listens.",
        ),
        *_options(),
    ],
)

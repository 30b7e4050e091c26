"""`polarcache`: serve, ask a service, judge a codec.

A command's module is imported when the command runs, so that each needs only its own extras.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version

import click

__all__ = ["main"]

_COMMANDS = {
    "serve": ("polarcache.cli.serve", "Run the cache service."),
    "ping": ("polarcache.cli.client", "Ask whether the service is there and well."),
    "describe": ("polarcache.cli.client", "Show what the service is and its namespaces."),
    "lookup": ("polarcache.cli.client", "Find the longest stored prefix of block keys."),
    "stats": ("polarcache.cli.client", "Show counters and gauges."),
    "clear": ("polarcache.cli.client", "Remove stored blocks."),
    "codec": ("polarcache.cli.codec", "Judge codecs on your own tensors."),
    "calibrate": ("polarcache.cli.calibrate", "Measure a model's queries for its key codec."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module_name, _ = _COMMANDS[cmd_name]
        try:
            command: click.Command = getattr(import_module(module_name), cmd_name)
        except ModuleNotFoundError as error:
            extra = "server" if cmd_name in ("serve", "codec") else "cli"
            raise click.ClickException(
                f"polarcache {cmd_name} needs the package {error.name}: "
                f"pip install 'polarcache[{extra}]'"
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("polarcache"), prog_name="polarcache")
def main() -> None:
    """PolarCache, the shared store for LLM key/value caches."""

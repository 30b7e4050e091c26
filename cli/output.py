"""How commands print: tables for people, one JSON object for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import click
from rich.console import Console
from rich.table import Table

__all__ = ["human_bytes", "print_fields", "print_json", "print_rows"]


def print_json(value: object) -> None:
    """One JSON object on standard output."""
    click.echo(json.dumps(value, indent=2, sort_keys=True))


def print_fields(title: str, fields: Mapping[str, object]) -> None:
    """A table of names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in fields.items():
        table.add_row(name, str(value))
    Console().print(table)


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def human_bytes(num_bytes: int) -> str:
    """Bytes with a binary unit, such as "1.5 GiB"."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"

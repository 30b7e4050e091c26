"""`polarcache codec`: what a codec profile does to given keys and values."""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from polarcache.kernels import CodecError, Profile

if TYPE_CHECKING:
    import torch

    from polarcache.kernels.report import Report

_TENSOR_FIELDS = ("keys", "values")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def codec() -> None:
    """Codec profiles and their error."""


@codec.command()
@click.option("--profile", "profile_text", required=True, help="Such as k=pair:r4t4,v=int4.")
@click.option("--keys", "keys_path", required=True, type=_FILE, help="[tokens, heads, dim] .npy")
@click.option("--values", "values_path", required=True, type=_FILE, help="Like --keys.")
@click.option(
    "--save-decoded",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the decoded keys.npy and values.npy into this folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--pairing",
    type=click.Choice(["half", "interleaved"]),
    default="half",
    show_default=True,
    help="Which key channels RoPE turns together.",
)
@click.option("--rotary-dim", type=int, help="Key channels that RoPE turns.  [default: all]")
@click.option("--block-tokens", type=int, default=128, show_default=True, help="Tokens of a block.")
def report(
    profile_text: str,
    keys_path: Path,
    values_path: Path,
    save_decoded: Path | None,
    as_json: bool,
    pairing: Literal["half", "interleaved"],
    rotary_dim: int | None,
    block_tokens: int,
) -> None:
    """Codes KEYS and VALUES and prints bits, errors and sizes.

    Whole blocks are coded; the tail below one block stays exact and is left out of the errors.
    """
    try:
        profile = Profile.parse(profile_text)
    except CodecError as error:
        raise click.ClickException(str(error)) from error
    from polarcache.kernels.report import codec_report

    keys, values = _load(keys_path), _load(values_path)
    try:
        result = codec_report(
            profile,
            keys,
            values,
            pairing=pairing,
            rotary_dim=keys.shape[-1] if rotary_dim is None else rotary_dim,
            block_tokens=block_tokens,
        )
    except CodecError as error:
        raise click.ClickException(str(error)) from error
    if save_decoded is not None:
        _save(result, save_decoded)
    figures = _figures(result)
    if as_json:
        click.echo(json.dumps(figures))
    else:
        _print_table(figures)


def _figures(result: "Report") -> dict[str, Any]:
    """Returns every field of a report but its tensors, in order."""
    names = [field.name for field in fields(result) if field.name not in _TENSOR_FIELDS]
    return {name: getattr(result, name) for name in names}


def _load(path: Path) -> "torch.Tensor":
    """Reads an fp16 or fp32 array [tokens, heads, channels].

    Raises:
        click.ClickException: the file is no such array.
    """
    import numpy as np
    import torch

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise click.ClickException(f"{path}: not a readable .npy array ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32):
        found = getattr(array, "dtype", "an archive")
        raise click.ClickException(f"{path}: expected float16 or float32 numbers, found {found}")
    if array.ndim != 3:
        raise click.ClickException(
            f"{path}: expected shape [tokens, heads, channels], found {list(array.shape)}"
        )
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(native)


def _save(result: "Report", folder: Path) -> None:
    """Writes keys.npy and values.npy.

    Raises:
        click.ClickException: the folder or a file cannot be written.
    """
    import numpy as np

    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "keys.npy", result.keys.numpy())
        np.save(folder / "values.npy", result.values.numpy())
    except OSError as error:
        raise click.ClickException(f"{folder}: cannot write ({error})") from error


def _print_table(figures: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, figure in figures.items():
        text = f"{figure:.6g}" if isinstance(figure, float) else f"{figure}"
        table.add_row(name.replace("_", " "), text)
    Console().print(table)

"""Commands that ask a running service: ping, describe, lookup, stats, clear."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from google.protobuf.json_format import MessageToDict

from polarcache.cli.output import human_bytes, print_fields, print_json, print_rows
from polarcache.client import DEFAULT_ENDPOINT, Client, Namespace, chain_keys
from polarcache.proto.errors import PolarCacheError
from polarcache.proto.layout import NamespaceSpec
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["clear", "describe", "lookup", "ping", "stats"]

Command = Callable[..., None]


def _service_options(command: Command) -> Command:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--timeout", default=5.0, show_default=True, help="Deadline, seconds."),
        click.option(
            "--endpoint",
            default=DEFAULT_ENDPOINT,
            envvar="POLARCACHE_ENDPOINT",
            show_default=True,
            show_envvar=True,
            help="Where the service is.",
        ),
    ):
        command = option(command)
    return command


@contextmanager
def _connected(endpoint: str, timeout: float) -> Iterator[Client]:
    try:
        with Client(endpoint, timeout_s=timeout, shared_memory_bytes=0) as client:
            yield client
    except PolarCacheError as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error


def _health_name(service: pb.DescribeResponse) -> str:
    return pb.HealthStatus.Name(service.health).removeprefix("HEALTH_STATUS_").lower()


@click.command()
@_service_options
def ping(endpoint: str, timeout: float, *, as_json: bool) -> None:
    """Ask whether the service is there and well.

    Exits with 1 when it is not there. A degraded service is there: it serves its memory tier.
    """
    with _connected(endpoint, timeout) as client:
        client.describe()
        start_s = time.perf_counter()
        service = client.describe()
        milliseconds = (time.perf_counter() - start_s) * 1e3
    if as_json:
        print_json(
            {
                "health": _health_name(service),
                "health_reasons": list(service.health_reasons),
                "round_trip_ms": round(milliseconds, 3),
                "version": service.version,
                "boot_id": service.boot_id,
            }
        )
        return
    click.echo(f"{_health_name(service)}: {endpoint} answered in {milliseconds:.2f} ms")
    for reason in service.health_reasons:
        click.echo(f"  {reason}")


@click.command()
@_service_options
def describe(endpoint: str, timeout: float, *, as_json: bool) -> None:
    """Show what the service is, what it accepts, and its namespaces."""
    with _connected(endpoint, timeout) as client:
        service = client.describe()
        namespaces = client.list_namespaces()
    if as_json:
        result = MessageToDict(
            service, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        result["namespaces"] = [_namespace_fields(info) for info in namespaces]
        print_json(result)
        return
    limits = service.limits
    print_fields(
        "service",
        {
            "version": service.version,
            "health": "; ".join([_health_name(service), *service.health_reasons]),
            "boot id": service.boot_id,
            "device": service.device,
            "memory tier": human_bytes(limits.memory_bytes),
            "key codecs": ", ".join(service.key_codecs),
            "value codecs": ", ".join(service.value_codecs),
            "packed layout": f"version {service.layout_version}",
            "frame": human_bytes(limits.frame_bytes),
            "longest message": human_bytes(limits.max_message_bytes),
            "blocks a call": limits.max_blocks_per_call,
            "longest lease": f"{limits.max_lease_ms} ms",
            "local socket": service.local_socket or "none",
        },
    )
    rows = [list(_namespace_fields(info).values()) for info in namespaces]
    if rows:
        print_rows("namespaces", list(_namespace_fields(namespaces[0])), rows)


def _namespace_fields(info: pb.NamespaceInfo) -> dict[str, Any]:
    return {
        "namespace_id": info.namespace_id.hex(),
        "model": info.namespace.model,
        "profile": info.namespace.profile,
        "memory_blocks": info.memory_blocks,
        "packed_block_bytes": info.packed_block_bytes,
    }


@click.command()
@click.argument("namespace_id")
@click.argument("block_keys", nargs=-1)
@click.option(
    "--tokens",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A .npy file of token ids whose block keys polarcache.client.chain_keys makes.",
)
@_service_options
def lookup(
    namespace_id: str,
    block_keys: tuple[str, ...],
    tokens: Path | None,
    endpoint: str,
    timeout: float,
    *,
    as_json: bool,
) -> None:
    """Find the longest stored prefix of BLOCK_KEYS, in hex, in NAMESPACE_ID.

    NAMESPACE_ID is an id, or the beginning of one, that `polarcache describe` lists.
    """
    with _connected(endpoint, timeout) as client:
        namespace = _find_namespace(client, namespace_id)
        try:
            keys = [bytes.fromhex(key) for key in block_keys]
        except ValueError as error:
            raise click.ClickException(f"block keys must be hex: {error}") from error
        if tokens is not None:
            ids = np.load(tokens, allow_pickle=False).reshape(-1).tolist()
            keys += chain_keys(ids, namespace.spec.layout.block_tokens)
        match = client.lookup(namespace, keys, lease=False)
    if as_json:
        print_json(
            {
                "num_blocks": match.num_blocks,
                "num_tokens": match.num_tokens,
                "asked_blocks": len(keys),
                "tiers": list(match.tiers),
                "partial": match.partial,
            }
        )
        return
    click.echo(f"{match.num_blocks} of {len(keys)} blocks, {match.num_tokens} tokens")
    for tier in ("memory", "redis"):
        click.echo(f"  {tier}: {match.tiers.count(tier)} blocks")
    if match.partial:
        click.echo("  Redis did not answer; blocks there were not counted")


def _find_namespace(client: Client, namespace_id: str) -> Namespace:
    found = [
        info
        for info in client.list_namespaces()
        if info.namespace_id.hex().startswith(namespace_id.lower())
    ]
    if len(found) != 1:
        raise click.ClickException(
            f"{len(found)} open namespaces begin with {namespace_id!r}; `polarcache describe` "
            "lists them"
        )
    info = found[0]
    spec = NamespaceSpec.from_proto(info.namespace)
    slice_bytes = info.packed_block_bytes // spec.layout.num_layers
    return Namespace(info.namespace_id, spec, slice_bytes, key_bits=0.0, value_bits=0.0)


@click.command()
@_service_options
def stats(endpoint: str, timeout: float, *, as_json: bool) -> None:
    """Show the service's counters and gauges."""
    with _connected(endpoint, timeout) as client:
        response = client.stats()
    gauges, counters = dict(response.gauges), dict(response.counters)
    if as_json:
        print_json(
            {
                "boot_id": response.boot_id,
                "uptime_s": round(response.uptime_s, 3),
                "gauges": gauges,
                "counters": counters,
            }
        )
        return
    print_fields(f"gauges, {response.uptime_s:.0f} s after start", dict(sorted(gauges.items())))
    shown = {name: value for name, value in sorted(counters.items()) if value}
    print_fields("counters above zero", shown)


@click.command()
@click.option("--namespace", "namespace_id", help="Only this namespace: an id or its beginning.")
@click.option("--tier", type=click.Choice(["memory", "redis"]), help="Only this tier.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_service_options
def clear(
    namespace_id: str | None,
    tier: Any,
    endpoint: str,
    timeout: float,
    *,
    yes: bool,
    as_json: bool,
) -> None:
    """Remove stored blocks: all of them, one namespace's, or one tier's."""
    what = f"namespace {namespace_id}" if namespace_id else "all namespaces"
    where = tier or "all tiers"
    if not yes:
        click.confirm(f"Remove the blocks of {what} from {where}?", abort=True)
    with _connected(endpoint, timeout) as client:
        namespace = _find_namespace(client, namespace_id) if namespace_id else None
        response = client.clear(namespace, tiers=[tier] if tier else [])
    if as_json:
        print_json(
            {
                "memory_blocks": response.memory_blocks,
                "redis_records": response.redis_records,
            }
        )
        return
    click.echo(
        f"removed {response.memory_blocks} blocks from memory, "
        f"{response.redis_records} records from Redis"
    )

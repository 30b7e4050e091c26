"""The one place that sets up logging."""

from __future__ import annotations

import logging

__all__ = ["set_up_logging"]


def set_up_logging(level: str) -> None:
    """Logs of PolarCache and its libraries go to standard error, one line each.

    Args:
        level: Least severity: "debug", "info", "warning" or "error".
    """
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("grpc").setLevel(max(logging.INFO, logging.getLogger().level))

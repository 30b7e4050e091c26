"""A batcher for each test that asks."""

from collections.abc import Iterator
from typing import Any

import pytest

from polarcache.cache_service.attend_batcher import AttendBatcher
from polarcache.cache_service.metrics import Counters
from tests.cache_service.attend_fakes import HeldBack, Make


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[tuple[AttendBatcher, HeldBack]] = []

    def make(**options: int) -> tuple[AttendBatcher, HeldBack]:
        compute: Any = HeldBack()
        options = {"max_waiting": 100, "max_batch": 8, "window_us": 0} | options
        made.append((AttendBatcher(lambda: [compute], Counters(), **options), compute))
        return made[-1]

    yield make
    for batcher, compute in made:
        for _ in range(1000):
            compute.go.release()
        batcher.close()

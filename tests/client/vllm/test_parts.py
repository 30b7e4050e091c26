"""The small parts: gate, pins, recent keys, reports."""

from types import SimpleNamespace

from polarcache.client.vllm.gate import LoadGate
from polarcache.client.vllm.pins import PinnedBlocks
from polarcache.client.vllm.plan import WorkerReport
from polarcache.client.vllm.recent import RecentKeys


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_gate_closes_on_slow_loads_and_looks_again_later() -> None:
    clock = Clock()
    gate = LoadGate(1e9, clock)
    assert gate.is_open()
    gate.measured(int(4e9), 1.0)
    assert gate.is_open()
    gate.measured(int(1e6), 4.0)
    gate.measured(int(1e6), 4.0)
    gate.measured(int(1e6), 4.0)
    assert not gate.is_open()
    clock.now_s += 10
    assert gate.is_open()
    gate.passed()
    assert not gate.is_open()
    gate.measured(int(4e9), 1.0)
    assert gate.is_open()


def test_a_gate_without_a_limit_never_closes() -> None:
    gate = LoadGate(0.0)
    gate.measured(1, 100.0)
    assert gate.is_open()


def test_blocks_are_held_until_every_rank_is_done(fakes: SimpleNamespace) -> None:
    pool = fakes.Pool(16)
    pins = PinnedBlocks(num_ranks=2, max_blocks=8)
    pins.bind(pool)
    pins.hold(0, [3, 4])
    pins.hold(1, [4, 5])
    assert (pool.held, pins.room) == ({3, 4, 5}, 4)
    pins.done(0, 1)
    assert pool.held == {3, 4, 5}
    pins.done(0, 1)
    assert (pool.held, pins.room) == ({4, 5}, 6)
    pins.done(1, 2)
    pins.done(1, 1)
    assert (pool.held, pins.room) == (set(), 8)


def test_the_engine_waits_for_stores_but_not_for_stalled_ones(fakes: SimpleNamespace) -> None:
    clock = Clock()
    pins = PinnedBlocks(1, 8, clock)
    pins.bind(fakes.Pool(16))
    assert not pins.will_free_soon()
    pins.hold(0, [1])
    assert pins.will_free_soon()
    clock.now_s += 1
    assert not pins.will_free_soon()


def test_keys_are_remembered_for_a_while() -> None:
    clock = Clock()
    recent = RecentKeys(ttl_s=60, max_keys=3, clock=clock)
    recent.add([b"a", b"b"])
    clock.now_s += 40
    recent.add([b"a", b"c"])
    assert b"a" in recent
    clock.now_s += 30
    # Offering a key again does not make it younger.
    assert b"a" not in recent
    assert b"c" in recent
    recent.add([b"d", b"e", b"f"])
    assert b"c" not in recent
    recent.clear()
    assert b"f" not in recent


def test_reports_of_ranks_add_up() -> None:
    one = WorkerReport({1: 1}, {"x"}, {"r": 1}, set(), 10, 0.5)
    other = WorkerReport({1: 1, 2: 1}, set(), {"r": 1}, {"r"}, 0, 0.0)
    total = one + other
    assert total == WorkerReport({1: 2, 2: 1}, {"x"}, {"r": 2}, {"r"}, 10, 0.5)
    assert WorkerReport().is_empty
    assert not total.is_empty

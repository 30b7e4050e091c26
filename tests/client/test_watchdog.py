import threading
import time

from polarcache.client._watchdog import Watchdog


def test_a_late_guard_is_told_once_and_others_are_not() -> None:
    dog = Watchdog()
    told: list[str] = []
    late = threading.Event()
    patient = dog.watch(lambda: told.append("patient"))
    hasty = dog.watch(lambda: (told.append("hasty"), late.set()))
    done = dog.watch(lambda: told.append("done"))
    patient.arm(60)
    start_s = time.monotonic()
    done.arm(0.5)
    done.disarm()
    # Set while the thread sleeps to a later deadline.
    hasty.arm(0.1)
    assert late.wait(5)
    assert 0.1 <= time.monotonic() - start_s < 2
    assert hasty.is_late
    assert not patient.is_late
    hasty.arm(0)
    patient.arm(0)
    while "patient" not in told:
        time.sleep(0.01)
        assert time.monotonic() - start_s < 5
    time.sleep(max(0.0, start_s + 0.6 - time.monotonic()))
    assert told == ["hasty", "patient"]


def test_its_thread_ends_with_its_last_guard_and_begins_with_the_next() -> None:
    dog = Watchdog()
    for _ in range(3):
        guard = dog.watch(lambda: None)
        guard.arm(100)
        thread = dog._thread
        assert thread is not None
        dog.forget(guard)
        thread.join(5)
        assert not thread.is_alive()

import inspect

import pytest

from polarcache.client import AsyncAttendStream, AsyncClient, AttendStream, Client


def methods(cls: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("blocking_class", "asynchronous_class"),
    [(Client, AsyncClient), (AttendStream, AsyncAttendStream)],
)
def test_both_kinds_have_the_same_methods_and_parameters(
    blocking_class: type, asynchronous_class: type
) -> None:
    blocking, asynchronous = methods(blocking_class), methods(asynchronous_class)
    assert blocking.keys() == asynchronous.keys()
    for name, signature in blocking.items():
        assert signature.parameters == asynchronous[name].parameters, name


def test_both_clients_are_made_alike() -> None:
    assert inspect.signature(Client).parameters == inspect.signature(AsyncClient).parameters


def test_every_async_method_is_a_coroutine_or_an_async_iterator() -> None:
    for name, member in inspect.getmembers(AsyncClient, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member), name

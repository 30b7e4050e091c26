import inspect

from polarcache.client import AsyncClient, Client


def methods(cls: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_")
    }


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    blocking, asynchronous = methods(Client), methods(AsyncClient)
    assert blocking.keys() == asynchronous.keys()
    for name, signature in blocking.items():
        assert signature.parameters == asynchronous[name].parameters, name
    assert inspect.signature(Client).parameters == inspect.signature(AsyncClient).parameters


def test_every_async_method_is_a_coroutine_or_an_async_iterator() -> None:
    for name, member in inspect.getmembers(AsyncClient, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member), name

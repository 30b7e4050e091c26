"""The example for transformers does what it says."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "examples" / "transformers" / "generate.py"
DOCUMENT = ROOT / "docs" / "transformers.md"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than this model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_second_and_third_request_start_from_the_store(
    service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.spec_from_file_location("example_generate", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)

    module.main(["--endpoint", service.endpoint])

    lines = capsys.readouterr().out.splitlines()
    assert "StoredPrefixCache: 0 of " in lines[0]
    assert "StoredPrefixCache: 896 of " in lines[2]
    assert "RemotePrefixCache: 896 of " in lines[4]
    # The same question, answered from either.
    assert lines[3] == lines[5]


def test_the_example_of_the_documentation_runs(
    service: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[0]
    assert "grpc://127.0.0.1:50061" in code
    monkeypatch.chdir(DOCUMENT.parent.parent)

    exec(code.replace("grpc://127.0.0.1:50061", service.endpoint), {})

    assert capsys.readouterr().out.splitlines()[1:] == ["RemotePrefixCache 384 tokens were there"]

import json
from pathlib import Path

import pytest

from polarcache.client._engine_config import EngineConfig
from polarcache.client.lmcache.objects import L2Config
from polarcache.client.sglang.config import HiCacheConfig

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "integrations.md"


@pytest.mark.parametrize(
    ("config", "heading"), [(HiCacheConfig, "SGLang"), (L2Config, "LMCache")], ids=str
)
def test_the_document_lists_every_option(config: type[EngineConfig], heading: str) -> None:
    sections = dict(part.split("\n", 1) for part in DOCUMENT.read_text().split("\n## ")[1:])
    section = sections[heading]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    expected = []
    for name, field in config.model_fields.items():
        default = "required" if field.is_required() else field.default
        shown = default if default != "" else "empty"
        expected.append(f"| `{name}` | {shown} | {field.description} |")
    assert rows == expected


def test_the_examples_are_options_that_exist() -> None:
    sglang = json.loads((ROOT / "examples/sglang/polarcache.json").read_text())
    # SGLang takes this one out before it makes the backend.
    sglang.pop("prefetch_threshold")
    assert HiCacheConfig.from_extra_config(sglang).revision == "main"
    lmcache = json.loads((ROOT / "examples/lmcache/polarcache.json").read_text())
    assert L2Config.parse("adapter_params", lmcache["adapter_params"]).num_kv_heads == 4

"""Writes the tables of settings from the code: the service's in README.md, vLLM's connector's.

python scripts/configuration_table.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from polarcache.cache_service.config import ENV_PREFIX, ServiceConfig
from polarcache.client.vllm.config import ConnectorConfig

ROOT = Path(__file__).parent.parent


def service_table() -> str:
    """The service's settings as a Markdown table."""
    lines = ["| flag | variable | default | |", "|---|---|---|---|"]
    for name, field in ServiceConfig.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = default.human_readable() if hasattr(default, "human_readable") else str(default)
        if name == "state_dir":
            shown = "the user's state directory"
        flag = name.replace("_", "-")
        flag = f"--{flag}/--no-{flag}" if isinstance(default, bool) else f"--{flag}"
        lines.append(f"| `{flag}` | `{ENV_PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(lines) + "\n"


def vllm_table() -> str:
    """The options of vLLM's connector as a Markdown table."""
    lines = ["| option | default | |", "|---|---|---|"]
    for name, field in ConnectorConfig.model_fields.items():
        default = field.default if field.default != "" else "empty"
        lines.append(f"| `polarcache.{name}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


TABLES = [
    ("README.md", "configuration", service_table),
    ("docs/integrations.md", "vllm options", vllm_table),
]


def main() -> int:
    """Writes the tables, or says whether they are up to date."""
    stale = 0
    for path, name, table in TABLES:
        document = ROOT / path
        text = document.read_text()
        begin, end = f"<!-- {name}: generated -->\n", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        _, tail = rest.split(end)
        fresh = head + begin + table() + end + tail
        stale |= fresh != text
        if "--check" not in sys.argv:
            document.write_text(fresh)
    return int(stale and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())

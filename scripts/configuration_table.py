"""Writes the configuration table of README.md from the service's configuration.

python scripts/configuration_table.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from polarcache.cache_service.config import ENV_PREFIX, ServiceConfig

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- configuration: generated -->\n", "<!-- end of configuration -->"


def table() -> str:
    """The settings as a Markdown table."""
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


def main() -> int:
    """Writes the table, or says whether it is up to date."""
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    fresh = head + BEGIN + table() + END + tail
    if "--check" in sys.argv:
        return int(fresh != text)
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())

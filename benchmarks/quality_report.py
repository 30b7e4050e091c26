"""Tables and a plot of figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quality_measure import Figures

_HEADER = (
    "profile",
    "bits k/v",
    "KL text",
    "KL recall",
    "perplexity %",
    "recall",
    "logit RMS",
    "output error",
)


def side(figures: Figures) -> str:
    """Which side a profile codes: keys, values, both or none."""
    coded = figures.key_bits < 16, figures.value_bits < 16
    return {(True, False): "keys", (False, True): "values", (True, True): "both"}.get(coded, "none")


def table(rows: list[Figures]) -> str:
    """Markdown tables, one for each side coded, in the order measured."""
    parts = []
    for name in ("keys", "values", "both", "none"):
        chosen = [row for row in rows if side(row) == name]
        if not chosen:
            continue
        title = {"none": "Nothing coded", "both": "Keys and values coded"}.get(
            name, f"{name.capitalize()} coded, the other side exact"
        )
        lines = [f"### {title}", "", _line(_HEADER), _line(["---"] * len(_HEADER))]
        lines += [_line(_cells(row)) for row in chosen]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cells(row: Figures) -> list[str]:
    return [
        f"`{row.profile}`",
        f"{row.key_bits:.3f} / {row.value_bits:.3f}",
        f"{row.kl_text:.2f} ± {row.kl_text_se:.2f}",
        f"{row.kl_recall:.2f} ± {row.kl_recall_se:.2f}",
        f"{row.perplexity_percent:+.3f} ± {row.perplexity_percent_se:.3f}",
        f"{row.recall:.3f}",
        f"{row.logit_rms:.4f}",
        f"{row.output_error:.4f}",
    ]


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def write(rows: list[Figures], about: dict[str, Any], folder: Path, stem: str) -> None:
    """Writes `stem`.json, .md and .png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"about": about, "rows": [row.as_dict() for row in rows]}
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    facts = "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in about.items())
    note = (
        "KL(exact‖coded) in milli-nats after tokens past the first block; ± is the standard error "
        "over documents. A token's own block is exact, earlier blocks are read through the codec."
    )
    (folder / f"{stem}.md").write_text(f"# Codec quality\n\n{facts}\n\n{note}\n\n{table(rows)}")
    plot(rows, folder / f"{stem}.png")


def plot(rows: list[Figures], path: Path) -> None:
    """Draws KL on text over bits, one panel for each side coded."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in ("keys", "values", "both") if any(side(r) == name for r in rows)]
    if not names:
        return
    figure, axes = plt.subplots(1, len(names), figsize=(6.5 * len(names), 5.5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for row in rows:
            if side(row) != name or not row.kl_text > 0:
                continue
            text, bits = _label(row, name)
            axis.errorbar(bits, row.kl_text, row.kl_text_se, fmt="o", markersize=5, capsize=2)
            axis.annotate(text, (bits, row.kl_text), (4, 3), textcoords="offset points", fontsize=7)
        axis.set(yscale="log", xlabel="bits per element", title=f"{name} coded")
        axis.set_xlim(axis.get_xlim()[0], axis.get_xlim()[1] + 0.8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("KL(exact‖coded) on text, milli-nats")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(row: Figures, name: str) -> tuple[str, float]:
    key, _, value = row.profile.removeprefix("k=").partition(",v=")
    if name == "keys":
        return key, row.key_bits
    if name == "values":
        return value, row.value_bits
    return f"{key} + {value}", row.bits

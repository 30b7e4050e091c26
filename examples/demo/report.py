"""The demo's tables, its one-line verdict and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

__all__ = ["attended_line", "draw_quality", "print_report", "verdict"]

Row = dict[str, Any]


def print_report(console: Console, results: dict[str, Any]) -> None:
    """Prints who was served what, and what each profile costs and keeps."""
    served = Table(title="who was served what", title_justify="left")
    for column in ("worker", "profile", "tokens matched", "from", "time to first token",
                   "without cache", "speed-up", "moved", "as recomputed", "right"):  # fmt: skip
        left = column in ("worker", "profile")
        fixed = column in ("profile", "moved")
        served.add_column(column, justify="left" if left else "right", no_wrap=fixed)
    for worker in ("B", "C", "D"):
        for row in results[worker]:
            served.add_row(
                worker,
                row["profile"],
                f"{row['tokens_matched']}",
                "+".join(row["tiers"]),
                f"{row['ttft_s'] * 1e3:.0f} ms",
                f"{row['ttft_without_s'] * 1e3:.0f} ms",
                f"{row['ttft_without_s'] / row['ttft_s']:.1f}x",
                _moved(row),
                f"{row['answers_agree']} of {row['answers']}",
                f"{row['answers_right']} of {row['answers']}",
            )
    console.print(served)
    kept = Table(title="what each profile costs and keeps", title_justify="left")
    for column in ("profile", "raw", "packed", "ratio", "bits/element", "perplexity", "change",
                   "KL (mnat)", "recall"):  # fmt: skip
        left = column == "profile"
        kept.add_column(column, justify="left" if left else "right", no_wrap=left)
    for sizes, row in zip(results["A"], results["C"], strict=True):
        change = row["perplexity"] / row["perplexity_exact"] - 1
        kept.add_row(
            row["profile"],
            f"{sizes['raw_bytes'] / 2**20:.2f} MiB",
            f"{sizes['packed_bytes'] / 2**20:.2f} MiB",
            f"{sizes['raw_bytes'] / sizes['packed_bytes']:.2f}x",
            f"{sizes['bits']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{change:+.2%}",
            f"{row['kl_millinats']:.1f}",
            f"{row['recall']:.1%}",
        )
    console.print(kept)


def _moved(row: Row) -> str:
    """What travelled: a retrieved prefix once, or queries and their attention for each token."""
    if "moved_token_bytes" in row:
        return f"{row['moved_token_bytes'] / 2**10:.1f} KiB/token"
    return f"{row['moved_bytes'] / 2**20:.2f} MiB"


def attended_line(results: dict[str, Any]) -> str:
    """One line about remote attention."""
    row = results["D"][0]
    return (
        f"worker D attended in the service: {row['moved_token_bytes'] / 2**10:.1f} KiB a token, "
        f"{row['moved_bytes'] / 2**10:.0f} KiB an answer, where retrieving moves "
        f"{row['retrieving_bytes'] / 2**20:.2f} MiB; logits within "
        f"{row['logits_from_retrieving']:.1e} of retrieving with {row['profile']}"
    )


def verdict(results: dict[str, Any]) -> tuple[bool, str]:
    """Whether everything is as it must be, and one line that says so."""
    rows = results["B"] + results["C"] + results["D"]
    exact = [row for row in rows if row["profile"] == "exact"]
    exact_agrees = all(row["answers_agree"] == row["answers"] for row in exact)
    from_redis = all(row["tiers"] == ["redis"] for row in results["C"])
    coded = [row for row in rows if row["profile"] != "exact"]
    agreeing = sum(row["answers_agree"] for row in coded)
    total = sum(row["answers"] for row in coded)
    line = (
        f"outputs {'agree' if exact_agrees else 'DISAGREE'}: exact profile equal to recomputing in "
        f"every answer{'' if exact_agrees else ' but some'}; quantized profiles in {agreeing} of "
        f"{total}; worker C was served {'' if from_redis else 'NOT '}from Redis alone"
    )
    return exact_agrees and from_redis, line


def draw_quality(results: dict[str, Any], path: Path) -> None:
    """One point a profile: how far its predictions are from exact, against bits per element."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 5))
    markers = iter("osD^vP*X")
    for sizes, row in zip(results["A"], results["C"], strict=True):
        if row["profile"] != "exact":
            label = f"{row['profile']}   recall {row['recall']:.0%}"
            axes.scatter(
                sizes["bits"],
                row["kl_millinats"],
                s=70,
                marker=next(markers),
                label=label,
                zorder=3,
            )
    axes.set_yscale("log")
    axes.margins(x=0.1, y=0.15)
    axes.legend(loc="upper right", fontsize=9)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("bits per element, keys and values, parameters included")
    axes.set_ylabel("KL(exact || coded) of the next token, milli-nats")
    axes.set_title("Tiny LM reading its whole prefix through the codec (lower is better)")
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_demo_runs_and_its_outputs_agree(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples/demo/run.py"), "--quick", "--output", str(tmp_path)],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=220)
    finally:
        process.terminate()  # Unlike kill, lets the demo end its service and Redis.
        process.wait()
    assert process.returncode == 0, printed
    results = json.loads((tmp_path / "results.json").read_text())
    num_tokens = results["settings"]["tokens"]
    for row in results["B"] + results["C"] + results["D"]:
        assert row["tokens_matched"] == num_tokens
        if row["profile"] == "exact":
            assert row["answers_agree"] == row["answers"] == row["answers_right"]
    assert {tuple(row["tiers"]) for row in results["B"]} == {("memory",)}
    assert {tuple(row["tiers"]) for row in results["C"]} == {("redis",)}
    assert results["spill"]["spilled_blocks"] > 0
    for row in results["D"]:
        # 4 layers of 4 heads of 64 channels: fp32 queries there, fp32 out and lse back.
        assert row["moved_token_bytes"] == 4 * 4 * (64 + 64 + 1) * 4
        assert row["moved_bytes"] < row["retrieving_bytes"] / 10
    assert results["D"][0]["logits_from_retrieving"] < 1e-3
    by_profile = {row["profile"]: row for row in results["C"]}
    assert by_profile["exact"]["perplexity"] == pytest.approx(
        by_profile["exact"]["perplexity_exact"], rel=1e-6
    )
    for sizes in results["A"]:
        if sizes["profile"] != "exact":
            assert sizes["raw_bytes"] / sizes["packed_bytes"] > 3.5
            row = by_profile[sizes["profile"]]
            assert row["perplexity"] < 1.2 * row["perplexity_exact"]
    assert (tmp_path / "quality.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "outputs agree" in printed.replace("\n", " ")

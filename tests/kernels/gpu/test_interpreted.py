import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).with_name("interpreted_cases.py")


@pytest.mark.parametrize(
    "chosen", ["polar or recursive or rotated", "not (polar or recursive or rotated)"]
)
def test_kernels_equal_plain_torch_in_the_interpreter(chosen: str) -> None:
    # Triton reads the variable when a kernel is defined, so the cases need their own process.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(CASES), "-k", chosen],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]

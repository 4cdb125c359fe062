"""Every example of the README and the docs that is marked to run, runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "sparing").exists(), reason="the package is not installed here (make setup does)"
)
def test_examples_run():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "check_examples.py"], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "examples ran, 0 pages failed" in done.stdout

"""Every example of the README and the docs that is marked to run, runs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "check_examples.py"
SPEC = importlib.util.spec_from_file_location("check_examples", EXAMPLES)
assert SPEC is not None
assert SPEC.loader is not None
check_examples = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_examples)
PAGES = [str(page.relative_to(ROOT)) for page in check_examples.pages()]


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "sparing").exists(), reason="the package is not installed here (make setup does)"
)
@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, EXAMPLES, page], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "examples ran, 0 pages failed" in done.stdout
    assert not done.stdout.endswith("\n0 examples ran, 0 pages failed\n")


def test_the_pages_with_examples_are_found():
    assert "docs/policies.md" in PAGES
    assert len(PAGES) > 5

"""`make test-versions`: the tests on the oldest versions that pyproject.toml promises, and on other versions of transformers.

Each runs in an environment of its own, `.venv-<name>`, made anew by pip under constraints and deleted if its tests pass (`--keep`
keeps all). A failure ends nothing; the table at the end says what failed, and so does the exit status.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
MOVES = ("transformers", "huggingface-hub", "tokenizers", "safetensors")
"""What goes with a version of transformers: pip chooses what fits."""


def constraints(version: str, folder: Path) -> Path:
    """The constraints for a version of transformers (`oldest`: those of constraints-oldest.txt as they stand)."""
    if version == "oldest":
        return HERE / "constraints-oldest.txt"
    lines = (HERE / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.split("==")[0] not in MOVES]
    path = folder / "constraints.txt"
    path.write_text("\n".join([*kept, f"transformers=={version}"]) + "\n")
    return path


def run(version: str, pytest: list[str], *, keep: bool) -> tuple[str, dict[str, int], float]:
    """One environment, one run: what became of it, how many tests passed, failed and were skipped, and seconds."""
    folder, start = HERE / f".venv-{version}", time.monotonic()
    python, report = folder / "bin" / "python", folder / "report.xml"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    limits = constraints(version, folder)
    install = [python, "-m", "pip", "install", "--quiet", "-c", limits, "-e", f"{HERE}[test]"]
    if subprocess.run(install).returncode:
        return "not installed", {}, time.monotonic() - start
    # The extra's other versions are pinned; this one is what the table is about.
    found = "import torch, transformers; print(torch.__version__.split('+')[0], transformers.__version__)"
    torch, installed = subprocess.run([python, "-c", found], check=True, capture_output=True, text=True).stdout.split()
    if torch != "2.13.0" or version not in ("oldest", installed):
        return f"torch {torch}, transformers {installed}", {}, time.monotonic() - start
    code = subprocess.run([python, "-m", "pytest", *pytest, f"--junit-xml={report}"], cwd=HERE).returncode
    counts = counted(report)
    if code == 0 and not keep:
        shutil.rmtree(folder)
    return "passed" if code == 0 else "FAILED", counts, time.monotonic() - start


def counted(report: Path) -> dict[str, int]:
    """Passed, failed and skipped tests of pytest's own report."""
    if not report.exists():
        return {}
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        return {}
    failed, skipped = int(suite.get("failures", 0)) + int(suite.get("errors", 0)), int(suite.get("skipped", 0))
    return {"passed": int(suite.get("tests", 0)) - failed - skipped, "failed": failed, "skipped": skipped}


def main() -> int:
    """All versions, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="+", help="versions of transformers, or `oldest`")
    parser.add_argument("--pytest", default="", help="arguments for pytest, in one string")
    parser.add_argument("--keep", action="store_true", help="keep the environments whose tests passed")
    chosen = parser.parse_args()
    results = {}
    for version in chosen.versions:
        sys.stdout.write(f"\n== {version}\n")
        sys.stdout.flush()
        try:
            results[version] = run(version, shlex.split(chosen.pytest), keep=chosen.keep)
        except (OSError, subprocess.CalledProcessError) as error:
            results[version] = (f"broken ({error})".replace("\n", " "), {}, 0.0)
    columns = ("passed", "failed", "skipped")
    lines = [f"\n{'version':<10}{''.join(f'{name:>9}' for name in columns)}{'seconds':>9}  outcome"]
    for version, (outcome, counts, seconds) in results.items():
        numbers = "".join(f"{counts.get(name, '-'):>9}" for name in columns)
        lines.append(f"{version:<10}{numbers}{seconds:>9.0f}  {outcome}")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(any(outcome != "passed" for outcome, _, _ in results.values()))


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)  # the environments are to hold what they say
    sys.exit(main())

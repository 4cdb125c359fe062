"""Run the fenced blocks of README.md and docs/*.md whose first line is ```python run or ```bash run.

    python docs/check_examples.py [PAGE ...]

A page's blocks run in order and share their variables and a temporary folder.
"""

import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(python|bash) run\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(page: Path) -> int:
    """Run one page's blocks, stopping at the first that fails; return how many ran."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    count = 0
    for match in BLOCK.finditer(text):
        language, code = match.groups()
        line = text.count("\n", 0, match.start(2))
        print(f"{page.relative_to(ROOT)}:{line} {language}", flush=True)
        if language == "python":
            # Blank lines in front make tracebacks point into the page.
            exec(compile("\n" * line + code, str(page), "exec"), names)
        elif code.startswith("sparing "):
            subprocess.run(["bash", "-euc", code], check=True, env={**os.environ, "PATH": path})
        else:
            raise ValueError(f"{page}:{line}: a bash block that runs must begin with `sparing `")
        count += 1
    return count


def pages() -> list[Path]:
    """The pages that have examples to run."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in every if BLOCK.search(page.read_text(encoding="utf-8"))]


def main() -> int:
    """Run the pages that are named, or every page; the exit code is the number of pages that failed."""
    failed, count = 0, 0
    for page in [ROOT / name for name in sys.argv[1:]] or pages():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                count += run_page(page)
            except Exception:
                traceback.print_exc()
                failed += 1
            finally:
                os.chdir(ROOT)
    print(f"{count} examples ran, {failed} pages failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())

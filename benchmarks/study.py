"""Does a study lose nothing, recompute nothing, and cost nothing beside its cells?

Kills (SIGKILL) a running study at random moments and goes on; runs the same study on a local Ray cluster and compares every
figure; and times what a cell costs beside its own work.

    python benchmarks/study.py --quick --json benchmarks/results/study.json
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sparing import zoo
from sparing.cli.record import write_json
from sparing.evaluate.environment import environment
from sparing.study import Store, Study

PAGE = Path(zoo.__file__).parent / "pages" / "arithmetic.txt"
GRID = """
study: grid
seeds: [0, 1, 2]
models: {{llama: {{path: arithmetic-llama}}}}
methods:
  dense: {{use: dense}}
  skip: {{use: SkipModules, over: {{attention: {attention}, mlp: [[], [3]]}}}}
  random: {{use: skip_random, with: {{text: {page}, matches: none, max_tokens: 512, window: 64}}, over: {{budget: [0.9, 0.7]}}}}
tasks:
  page: {{use: perplexity, with: {{text: {page}, window: 64, max_tokens: 1024}}}}
  short: {{use: perplexity, with: {{text: {page}, window: 32, max_tokens: 512}}}}
"""
# Says which cell begins and which one is in the file, so that the parent knows what a kill may take.
CHILD = """
import sys, torch
torch.set_num_threads(1)
from sparing.study import Study
class Told:
    def started(self, cell): print("start", cell.key, flush=True)
    def step(self, cell, done, line): pass
    def finished(self, cell, result): print("done", cell.key, flush=True)
Study(sys.argv[1], sys.argv[2]).run(watcher=Told())
"""


def started(folder: Path) -> dict[str, str]:
    """When each finished cell was run; a cell that is run again has another time."""
    path = folder / "results.sqlite"
    if not path.exists():
        return {}
    with Store(path) as store:
        return {s.key: f"{s.result.started} {s.result.seconds}" for s in store.cells(items=False)}


def killed(yaml: Path, folder: Path, kills: int, draw: random.Random) -> dict[str, int]:
    """Kill a study some times and finish it; count what was lost and what was run twice."""
    lost = recomputed = landed = 0
    for _ in range(kills):
        before = started(folder)
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(yaml), str(folder)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            lines: list[list[str]] = []
            # After some cells, and then at any moment of the next one.
            for _ in range(draw.randint(1, 6)):
                line = child.stdout.readline().split()
                if not line:
                    break
                lines.append(line)
            time.sleep(draw.random() * 0.05)
            child.send_signal(signal.SIGKILL)
            rest, _ = child.communicate()
        lines += [line.split() for line in rest.splitlines()]
        landed += child.returncode == -signal.SIGKILL
        after = started(folder)
        begun = {words[1] for words in lines if words[:1] == ["start"] and len(words) == 2}
        lost = max(lost, len(begun - after.keys()), len(before.keys() - after.keys()))
        recomputed += sum(after[key] != when for key, when in before.items() if key in after)
    before = started(folder)
    subprocess.run([sys.executable, "-c", CHILD, str(yaml), str(folder)], check=True, stdout=subprocess.DEVNULL)
    after = started(folder)
    recomputed += sum(after[key] != when for key, when in before.items())
    assert len(after) == len(Study(yaml, folder).cells)
    return {"kills": landed, "lost_after_kill": lost, "resumed_cells_recomputed": recomputed}


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """Every figure of every cell."""
    with Store(folder / "results.sqlite") as store:
        return {
            s.key: {
                name: f.value for name, f in s.result.outcome.figures.items() if f.unit not in ("seconds", "tokens/s")
            }
            for s in store.cells(items=False)
            if s.result.outcome is not None
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer kills and cells: under a minute on two cores")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begin, draw = time.perf_counter(), random.Random(options.seed)
    attention = [[0], [1]] if options.quick else [[0], [1], [2], [3], [4], [5]]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        yaml = folder / "grid.yaml"
        yaml.write_text(GRID.format(attention=attention, page=PAGE))
        quiet = Study(yaml, folder / "quiet", environment=environment())
        start = time.perf_counter()
        quiet.run()
        wall = time.perf_counter() - start
        own = sum(s.result.seconds + s.result.prepared for s in quiet.results())
        found: dict[str, object] = {
            "cells": len(quiet.cells),
            "overhead_per_cell_s": round((wall - own) / len(quiet.cells), 4),
        }
        found |= killed(yaml, folder / "killed", 2 if options.quick else 20, draw)
        found["killed_equals_quiet"] = figures(folder / "killed") == figures(folder / "quiet")
        Study(yaml, folder / "ray").run(on="ray")
        found["ray_equals_local"] = figures(folder / "ray") == figures(folder / "quiet")
    seconds = round(time.perf_counter() - begin, 1)
    for name, value in found.items():
        print(f"{name:26} {value}")
    print(f"{'seconds':26} {seconds}")
    if options.json:
        write_json(options.json, {**found, "seed": options.seed, "seconds": seconds, **environment()})


if __name__ == "__main__":
    main()

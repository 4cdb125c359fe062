"""Tasks with pictures, of lmms-eval: asked by a process in lmms-eval's own environment, which its pinned packages need."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal

from sparing.checkpoint import save
from sparing.evaluate.task import Figure, NotApplicable, Outcome, Progress, Subject, Task
from sparing.evaluate.tasks.metering import check_batch

SUITES: dict[str, dict[str, str]] = {
    "vlm": {
        "MME": "mme",
        "GQA": "gqa",
        # The dev split with answers matched by rule: `mmbench_en_dev` asks a judge over the network.
        "MMBench": "mmbench_en_dev_static",
        "MMBench-CN": "mmbench_cn_dev",
        "POPE": "pope",
        # It counts pictures (`seed_image`) and videos apart.
        "SEED-I": "seedbench",
        "SQA-I": "scienceqa_img",
        "TextVQA": "textvqa_val",
        # The test split's answers are with a server.
        "VQAv2": "vqav2_val",
    }
}
"""Benchmarks that papers on vision-language models report together, by the names they have in lmms-eval 0.7.3.

Paper: ViCA's tables report the nine of `vlm`.
"""

_WORKER = "sparing.evaluate.tasks.lmms_worker"
_LOOK = "from importlib.util import find_spec as f; print([n for n in ('lmms_eval', 'sparing') if f(n) is None])"
_CURE = (
    "lmms-eval pins packages that others need newer, so give it an environment of its own (pip install 'sparing[vlm]' "
    "there), and say which Python that is: python=path/to/its/bin/python (--vlm-python)"
)


@dataclasses.dataclass(frozen=True)
class LmmsTask(Task):
    """Any task of lmms-eval that generates answers or chooses between them, with pictures or without.

    The model is saved with its policies into a folder that is thrown away, and a process of another environment loads it and asks;
    so there is room needed for it on the disk, and twice in memory.

    Figures: those of the task, then `output_tokens`, `truncated`, `seconds_per_solved` and costs, as for `GenerationTask`.

    Attributes:
        task: a name that lmms-eval knows: a task, group or tag.
        include: a folder of further YAML files, found by the names in them. The process works there, so that relative
            `data_files` lie there too.
        limit: documents to ask, the first ones; all by default.
        batch: rows of a batch; `auto` halves them when memory runs out.
        metric: the figure that counts; the task's first one by default.
        max_new_tokens: most tokens to write; as the task has it by default.
        python: the interpreter that has lmms-eval and sparing; this one by default.
    """

    task: str
    include: Path | None = None
    limit: int | None = None
    batch: int | Literal["auto"] = "auto"
    metric: str | None = None
    max_new_tokens: int | None = None
    python: Path | None = None

    def check(self) -> None:
        """Look at the settings, and whether there is an lmms-eval to ask. Whether it knows the task shows when it starts."""
        check_batch(self.batch)
        for name in ("limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1, or none given")
        if self.include is not None and not self.include.is_dir():
            raise ValueError(f"include={self.include}: expected a folder of YAML files")
        if self.python is None:
            if find_spec("lmms_eval") is None:
                raise ValueError(f"lmms-eval is not installed here: {_CURE}")
            return
        try:
            looked = subprocess.run(
                [self._interpreter(), "-c", _LOOK], capture_output=True, text=True, timeout=120, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ValueError(f"python={self.python} is no Python that runs: {_last_line(str(error))}") from error
        missing = looked.stdout.strip()
        if not missing.startswith("["):
            raise ValueError(f"python={self.python} is no Python: it runs, and does not answer")
        if missing != "[]":
            raise ValueError(f"python={self.python} lacks {missing.strip('[]')}: {_CURE}")

    def files(self) -> tuple[Path, ...]:
        """All files of `include`, local data among them; nothing of what lmms-eval brings itself."""
        if self.include is None:
            return ()
        found = self.include.rglob("*")
        return tuple(sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts))

    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Save, ask, and read what was found."""
        self.check()
        tell = on_step or (lambda done, word: None)
        model: Any = subject.model
        with tempfile.TemporaryDirectory(prefix="sparing-lmms-") as scratch:
            folder = Path(scratch)
            tell(0.0, "saving the model for lmms-eval's process")
            save(model, folder / "model", subject.policies, processor=subject.processor)
            request = {
                "task": self.task,
                "include": None if self.include is None else str(self.include.absolute()),
                "limit": self.limit,
                "batch": self.batch,
                "metric": self.metric,
                "max_new_tokens": self.max_new_tokens,
                "model": str(folder / "model"),
                "device": str(model.get_input_embeddings().weight.device),
                "execute": subject.execute,
                "seed": seed,
                "scratch": str(folder / "submissions"),
                "found": str(folder / "found.json"),
            }
            (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
            tell(0.0, "lmms-eval is starting")
            self._run(folder, tell)
            found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        if "not_applicable" in found:
            raise NotApplicable(found["not_applicable"])
        if "error" in found:
            raise ValueError(found["error"])
        figures = {name: Figure(**figure) for name, figure in found["figures"].items()}
        return Outcome(figures, found["items"], found["details"])

    def _interpreter(self) -> str:
        # Not resolved: an environment's Python is a link, and is known by where that lies.
        return sys.executable if self.python is None else str(self.python.expanduser().absolute())

    def _run(self, folder: Path, tell: Progress) -> None:
        """Run the process to its end.

        Raises:
            ValueError: it broke off; with its last line.
        """
        with (folder / "errors.txt").open("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(
                [self._interpreter(), "-m", _WORKER, str(folder / "request.json")],
                cwd=folder if self.include is None else self.include,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            try:
                assert process.stdout is not None
                _follow(process.stdout, tell)
                code = process.wait()
            finally:
                # Whatever stopped us stops it.
                if process.poll() is None:
                    process.kill()
                    process.wait()
                if process.stdout is not None:
                    process.stdout.close()
            if code != 0 or not (folder / "found.json").exists():
                errors.seek(max(0, os.fstat(errors.fileno()).st_size - 20_000))
                raise ValueError(
                    f"lmms-eval's process ended with {code} on the task {self.task}: {_last_line(errors.read())}"
                )


def _follow(lines: IO[str], tell: Progress) -> None:
    """Pass the process's progress on, until it closes its end."""
    for line in lines:
        done, words = json.loads(line)
        tell(done, words)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")

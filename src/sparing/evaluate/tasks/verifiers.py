"""Is an answer right? Exactly, as a number, as mathematics, or as a program."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from sparing.evaluate.tasks.code_execution import run_code

VerifierName = Literal["exact", "number", "math", "code"]
_NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?%?")
_FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_MATH_SECONDS = 5
# Beyond math-verify's own limits (two parses, one comparison): then the process itself is stuck.
_STUCK_SECONDS = 3 * _MATH_SECONDS + 5
_START_SECONDS = 120


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one answer.

    Attributes:
        right: whether it is.
        error: why it could not be judged, or how it failed; empty where there is nothing to say. Not judged is not right.
    """

    right: bool
    error: str = ""


Verify = Callable[[str, Any], Verdict]
"""Takes the model's text and the row's answer."""


def exact(text: str, gold: Any) -> Verdict:
    """The whole text is the answer, spaces at both ends and runs of spaces aside."""
    return Verdict(" ".join(text.split()) == " ".join(str(gold).split()))


def number(text: str, gold: Any) -> Verdict:
    """The last number of the text is the last number of the answer, to a relative 1e-6."""
    wanted, found = last_number(str(gold)), last_number(text)
    if wanted is None:
        return Verdict(False, "the gold answer has no number")
    return Verdict(found is not None and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9))


def last_number(text: str) -> float | None:
    """The last number of a text: `1,234.5`, `-3`, `12%` (as 12), `6e3`."""
    for match in reversed(_NUMBER.findall(text)):
        with contextlib.suppress(InvalidOperation):
            return float(Decimal(match.rstrip("%").replace(",", "").replace("−", "-")))
    return None


def program_of(text: str) -> str:
    """The last fenced block of a text, or all of it where there is none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


@contextlib.contextmanager
def verifier(name: VerifierName, *, allow_code: bool = False, timeout: float = 10.0) -> Iterator[Verify]:
    """A verifier by name, with what it needs, for the length of a `with` block.

    Args:
        name: `exact`, `number`, `math` or `code`.
        allow_code: whether programs that a model wrote may run here.
        timeout: seconds of one program.

    Raises:
        ValueError: `code` that nobody allowed.
        ModuleNotFoundError: `math` without math-verify.
    """
    if name == "exact":
        yield exact
    elif name == "number":
        yield number
    elif name == "math":
        judge = MathJudge()
        try:
            yield judge
        finally:
            judge.close()
    else:
        check_code_allowed(allow_code)

        def code(text: str, gold: Any) -> Verdict:
            done = run_code(program_of(text) + "\n\n" + str(gold) + "\n", seconds=timeout)
            return Verdict(done.passed, done.error)

        yield code


def check_code_allowed(allow_code: bool) -> None:
    """Refuse to run a model's programs unasked.

    Raises:
        ValueError: it is not allowed.
    """
    if not allow_code:
        raise ValueError(
            "verifier=code runs programs that the model wrote on this machine, with limits but no real sandbox: say "
            "allow_code=true (--allow-code) if that is acceptable here, best inside a container"
        )


class MathJudge:
    """math-verify in a process of its own, so that it works in any thread; started again when it is stuck.

    Raises:
        ModuleNotFoundError: math-verify is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError("No module named 'math_verify'", name="math_verify")
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, text: str, gold: Any) -> Verdict:
        """Whether the text's final answer equals the gold one, as mathematics."""
        wanted = str(gold)
        # A bare answer is LaTeX more often than not, and is found in a text only inside an environment.
        wanted = wanted if "$" in wanted or "\\boxed" in wanted else f"${wanted}$"
        process = self._started()
        assert process.stdin is not None
        line = json.dumps({"gold": wanted, "answer": text, "seconds": _MATH_SECONDS})
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            found = json.loads(self._line(_STUCK_SECONDS))
        except (OSError, TimeoutError, ValueError) as error:
            self.close()
            return Verdict(False, f"math-verify gave no answer: {error}")
        if found is None:
            return Verdict(False, "the gold answer is nothing that math-verify can read")
        return Verdict(found) if isinstance(found, bool) else Verdict(False, found)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("math_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._line(_START_SECONDS)
        return self._process

    def _line(self, seconds: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"nothing after {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise OSError("its process ended")
        return line

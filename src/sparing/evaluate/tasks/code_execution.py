"""Programs that a model wrote, run in a process with limits.

What holds: CPU time, memory, size of files, a folder of its own that is thrown away, no environment, no open files, no children, no
sockets, and an end for all of it when time is up. Where the system lets us, it has no network and cannot see other processes.
What does not: it reads what the user can read, and a program written to break out of CPython will. Use a container for those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

MEMORY_MIB = 1024
FILE_MIB = 16
# Beyond the program's own seconds, for Python to start.
_START_SECONDS = 3.0
# User, network, process and IPC namespaces; when the first process ends, all that it left behind ends with it.
_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")


@dataclasses.dataclass(frozen=True)
class Executed:
    """How a program ended.

    Attributes:
        passed: it came to its end without an exception.
        error: why not.
    """

    passed: bool
    error: str = ""


def run_code(program: str, *, seconds: float = 10.0, memory_mib: int = MEMORY_MIB) -> Executed:
    """Run a Python program under limits.

    Args:
        program: its source; it passes if it comes to its end without an exception.
        seconds: of CPU and on the clock.
        memory_mib: of address space.

    Raises:
        ValueError: the system has no resource limits (Windows).
    """
    if os.name != "posix":
        raise ValueError("verifier=code needs the resource limits of a POSIX system: run it on Linux")
    word = secrets.token_hex(16)
    asked = {
        "program": program,
        "word": word,
        "seconds": math.ceil(seconds),
        "memory_mib": memory_mib,
        "file_mib": FILE_MIB,
    }
    guard = Path(__file__).with_name("code_guard.py")
    with tempfile.TemporaryDirectory(prefix="sparing-code-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            # -I: no environment, no user packages, and not the folder of this file on the path.
            [*_isolation(), sys.executable, "-I", "-B", str(guard)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(json.dumps(asked).encode(), timeout=seconds + _START_SECONDS)
        except subprocess.TimeoutExpired:
            return Executed(False, f"no end after {seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate()
    try:
        found = json.loads(out)
    except ValueError:
        return Executed(False, f"stopped before its end, out of CPU time or by itself (exit code {process.returncode})")
    if not isinstance(found, dict) or found.get("word") != word:
        return Executed(False, "the program wrote a verdict of its own")
    return Executed(not found["error"], str(found["error"]))


@functools.cache
def _isolation() -> tuple[str, ...]:
    """`unshare`, where the system permits it."""
    if shutil.which("unshare") is None:
        return ()
    tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, timeout=10, check=False)
    return _UNSHARE if tried.returncode == 0 else ()


def isolated() -> bool:
    """Whether programs run here without a network, out of sight of other processes."""
    return bool(_isolation())

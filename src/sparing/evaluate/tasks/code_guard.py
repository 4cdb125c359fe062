"""Runs one program under limits. Executed as a script in a process of its own, never imported.

The parent writes JSON to stdin: the program, the limits, and a word to print once the program has come to its end.
"""

import json
import os
import resource
import sys

# What a program that solves a puzzle has no business with. Hooks cannot be taken off again from Python.
_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill", "os.killpg", "os.putenv",
    "os.chown", "os.chmod", "os.link", "os.symlink", "pty.spawn", "subprocess.Popen", "socket.", "ctypes.", "signal.pthread_kill",
    "shutil.", "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.", "code.__new__.native", "gc.",
    "sys._current_frames", "resource.setrlimit", "resource.prlimit", "syslog.", "fcntl.",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime", "os.mkfifo", "os.mknod")


def main() -> None:
    """Set the limits, then run the program."""
    asked = json.loads(sys.stdin.buffer.read())
    out = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    megabytes = 1 << 20
    _limit(resource.RLIMIT_CPU, asked["seconds"])
    _limit(resource.RLIMIT_AS, asked["memory_mib"] * megabytes)
    _limit(resource.RLIMIT_FSIZE, asked["file_mib"] * megabytes)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, 32)
    _limit(resource.RLIMIT_NPROC, 0)
    here = os.path.realpath(os.getcwd())
    program, word = asked["program"], asked["word"]
    del asked
    sys.addaudithook(_hook(here))
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    error = ""
    try:
        exec(compile(program, "<program>", "exec"), names)
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"[:200]
    # Not reached by os._exit, whose exit code of 0 would otherwise pass for success.
    out.write(json.dumps({"word": word, "error": error}))
    out.flush()
    os._exit(0)


def _hook(here: str):
    def refuse(event: str, arguments: tuple) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(mode, str) and any(c in mode for c in "wax+")
            writes = writes or (isinstance(flags, int) and bool(flags & _WRITES))
            if writes and not _inside(path, here):
                raise PermissionError("writing outside of the working folder is not allowed here")
            if isinstance(path, (str, bytes)) and os.fsdecode(path).startswith("/proc"):
                raise PermissionError("/proc is not allowed here")
        elif event in _CHANGES and not all(_inside(a, here) for a in arguments if isinstance(a, (str, bytes))):
            raise PermissionError(f"{event} outside of the working folder is not allowed here")

    return refuse


def _inside(path: object, here: str) -> bool:
    if not isinstance(path, (str, bytes)):
        return isinstance(path, int) and path > 2
    whole = os.path.realpath(os.path.join(here, os.fsdecode(path)))
    return whole == here or whole.startswith(here + os.sep)


def _limit(which: int, value: int) -> None:
    _, most = resource.getrlimit(which)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(which, (value, value))


if __name__ == "__main__":
    main()

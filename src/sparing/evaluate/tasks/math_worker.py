"""Judges mathematical answers with math-verify, one JSON line in, one out. Run as a script of its own, never imported.

math-verify stops endless simplifications by signals, which only the main thread of a process can have; here it is in one.
"""

import contextlib
import json
import sys


def main() -> None:
    """Answer until the input ends."""
    from math_verify import parse, verify

    out = sys.stdout
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            try:
                gold = parse(asked["gold"], parsing_timeout=asked["seconds"], raise_on_error=True)
                answer = parse(asked["answer"], parsing_timeout=asked["seconds"], raise_on_error=True)
                # The gold answer comes first: the comparison is not symmetric.
                found = verify(gold, answer, timeout_seconds=asked["seconds"], raise_on_error=True) if gold else None
            except BaseException as error:
                # What cannot be compared is no wrong answer, and is counted apart.
                found = f"{type(error).__name__}: {error}"[:200]
        out.write(json.dumps(found) + "\n")
        out.flush()


if __name__ == "__main__":
    main()

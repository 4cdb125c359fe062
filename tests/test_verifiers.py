"""Who judges answers: numbers, mathematics in a process of its own, and programs under limits that hostile ones do not escape."""

import re
import threading

import pytest

from sparing.evaluate.tasks.code_execution import run_code
from sparing.evaluate.tasks.verifiers import last_number, verifier


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 1,234.5.", 1234.5),
        ("from 3 to -7", -7),
        ("6e3", 6000),
        ("12%", 12),
        ("−4", -4),
        ("none", None),
        ("so 5 apples", 5),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_math_is_judged_as_mathematics_in_any_thread():
    verdicts = {}

    def judge():
        with verifier("math") as verify:
            verdicts["same"] = verify("so the answer is $\\frac{1}{2}$", "0.5")
            verdicts["boxed"] = verify("thus \\boxed{x^2+2x+1}", "$(x+1)^2$")
            verdicts["wrong"] = verify("the answer is $3$", "4")
            verdicts["nothing"] = verify("I do not know", "4")

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert {name: v.right for name, v in verdicts.items()} == {
        "same": True,
        "boxed": True,
        "wrong": False,
        "nothing": False,
    }
    assert not any(v.error for v in verdicts.values())


def test_a_math_worker_that_dies_is_started_again(monkeypatch):
    with verifier("math") as judge:
        assert judge("$2$", "2").right
        judge._process.kill()
        judge._process.wait()
        assert judge("$3$", "3").right


HOSTILE = {
    "while True: pass": "stopped before its end|no end after",
    "import time\ntime.sleep(60)": "no end after",
    "import os\nwhile True: os.fork()": "not allowed|Resource",
    "import subprocess\nsubprocess.run(['true'])": "not allowed",
    "x = bytearray(1 << 34)": "MemoryError",
    "open('{outside}', 'w').write('x')": "not allowed",
    "import os\nos.remove('{victim}')": "not allowed",
    "open('big', 'wb').write(b'x' * (1 << 26))": "too large",
    "import os\nassert os.environ.get('SPARING_SECRET'), 'no secret'": "no secret",
    "import os\nos._exit(0)": "stopped before its end",
    "import sys\nsys.exit(0)": "SystemExit",
    "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)": "not allowed|refused|unreachable",
    "import ctypes\nctypes.CDLL(None)": "not allowed",
    "def (": "SyntaxError",
}


@pytest.mark.parametrize("program", HOSTILE, ids=lambda p: p.splitlines()[-1][:30])
def test_hostile_programs_do_no_harm(program, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_SECRET", "x")
    if "sleep" in program:
        monkeypatch.setattr("sparing.evaluate.tasks.code_execution._START_SECONDS", 0.5)
    victim = tmp_path / "victim"
    victim.write_text("whole")
    source = program.replace("{outside}", str(tmp_path / "outside")).replace("{victim}", str(victim))
    found = run_code(source, seconds=1)
    assert not found.passed
    assert re.search(HOSTILE[program], found.error), found.error
    assert victim.read_text() == "whole"
    assert not (tmp_path / "outside").exists()


def test_honest_programs_pass():
    assert run_code(
        "import math, collections\nopen('a', 'w').write('x')\nassert open('a').read() == 'x' and math.gcd(4, 6) == 2"
    ).passed
    with pytest.raises(ValueError, match="allow-code"), verifier("code"):
        pass
    with verifier("code", allow_code=True) as verify:
        text = "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."
        assert verify(text, "assert double(4) == 8").right
        wrong = verify(text, "assert double(4) == 9")
        assert (wrong.right, wrong.error) == (False, "AssertionError: ")

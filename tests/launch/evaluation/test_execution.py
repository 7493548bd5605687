"""Verdicts: right programs pass, wrong ones do not, and none can forge its own."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import process_stat

from data.cli import UserError
from launch.evaluation import execution
from launch.evaluation.execution import SandboxError, execute, execute_all, first_slot, read_verdict
from launch.evaluation.job import Job, Verdict
from launch.evaluation.sandbox import process
from launch.evaluation.sandbox.inside import attempts
from launch.evaluation.sandbox.inside.warden import parents
from launch.evaluation.sandbox.levels import LEVELS, Level
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.sandbox.probe import Isolation, find_isolation, probe, targets
from launch.evaluation.sandbox.process import Confined, descendants, start

LIMITS = Limits(seconds=2)
TESTS = "def check(candidate):\n    assert candidate(20) == 21\n    assert candidate(-1) == 0\n\n\ncheck(successor)\n"


@pytest.fixture(scope="module")
def isolation() -> Isolation:
    return find_isolation()


def judged(isolation: Isolation, program: str, test: str = TESTS, entry_point: str = "successor", reference: str = "") -> Verdict:
    job = Job(program=textwrap.dedent(program), test=test, entry_point=entry_point, reference=reference)
    return execute(job, level=isolation.level, limits=LIMITS, slot=os.getpid())


# Each fools a common way to judge; see FOOLED.
FORGERIES = {
    "walks the stack": """
        import inspect
        for frame in inspect.stack():
            for value in [*frame.frame.f_locals.values(), *frame.frame.f_globals.values()]:
                if isinstance(value, list) and not value:
                    value.append("passed")
        def successor(x): return None
    """,
    "exits well": "import os\nos._exit(0)\n",
    "exits well at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef successor(x): return None\n",
    "prints what it reads in its own command": """
        import sys, os
        text = "".join(sys.orig_argv)
        if "SENTINEL" in text:
            print(text[text.rindex("SENTINEL"):][:17], flush=True)
        os._exit(0)
    """,
    "equals everything": """
        class Any:
            def __eq__(self, other): return True
        def successor(x): return Any()
    """,
    "disarms assertions": """
        import sys
        import os
        def profile(frame, event, argument):
            if event == "return" and frame.f_code.co_name == "check":
                os._exit(0)
        sys.setprofile(profile)
        def successor(x): return None
    """,
}
IN_PROCESS = """
import sys
result = []
try:
    exec({program} + "\\n" + {test}, {{}})
    result.append("passed")
except BaseException as error:
    result.append("failed")
print(result[0])
"""
SENTINEL = "SENTINEL-12345678"


def naive_passes(program: str, way: str) -> bool:
    """How it is often done: a list in the same interpreter, an exit code, a printed sentinel."""
    if way == "list":
        text = IN_PROCESS.format(program=repr(program), test=repr(TESTS))
        done = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, text=True, check=False)
        return done.stdout.strip() == "passed"
    text = program + "\n" + TESTS + (f"print({SENTINEL!r})\n" if way == "sentinel" else "")
    done = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, text=True, check=False)
    return SENTINEL in done.stdout if way == "sentinel" else done.returncode == 0


FOOLED = {
    "walks the stack": "list",
    "exits well": "exit code",
    "exits well at the end": "exit code",
    "prints what it reads in its own command": "sentinel",
    "equals everything": "list",
    "disarms assertions": "exit code",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_fool_a_naive_judge_and_not_ours(isolation: Isolation, name: str) -> None:
    program = textwrap.dedent(FORGERIES[name])
    assert naive_passes(program, FOOLED[name]), "the forgery proves nothing"
    assert not judged(isolation, program).passed


# What a program can send to its judge in the place of answers. It tries every descriptor: a process that has many open, as
# this one may, hands on high ones.
MESSAGES = {
    "a verdict": b'{"passed": true, "result": "passed"}\n' * 20,
    "no JSON": b"\xff\xfe\n" * 20,
    "no object": b"[1]\n" * 20,
    "nested without end": b"[" * 100_000 + b"\n",
    "an unknown type": b'{"ready": true}\n' + b'{"value": {"type": "code", "value": "1"}}\n' * 20,
    "a function of Python's": b'{"ready": true}\n' + b'{"value": {"type": "type", "value": "exec"}}\n' * 20,
    "a line without end": None,
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_only_values(isolation: Isolation, name: str) -> None:
    text = MESSAGES[name]
    write = "while True: os.write(fd, b'x' * 65536)" if text is None else f"os.write(fd, {text!r})"
    program = f"import os, stat\nfor fd in range(3, 4096):\n    try:\n        {write}\n    except OSError:\n        pass\n"
    assert not judged(isolation, program + "def successor(x): return None\n").passed


def test_pre_sent_right_answers_are_right_answers(isolation: Isolation) -> None:
    """The control of the test above: the channel was hit. Sending the right values is what a right program does."""
    text = b'{"ready": true}\n{"value": true}\n{"value": 21}\n{"value": 0}\n'
    program = f"import os\nfor fd in range(3, 4096):\n    try:\n        os.write(fd, {text!r})\n    except OSError:\n        pass\n"
    assert judged(isolation, program).passed


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("def successor(x): return x + 1", "passed"),
        ("def successor(x): return x", "failed: AssertionError"),
        ("def successor(x): pass", "failed: AssertionError"),
        ("def successor(x) return x", "failed: SyntaxError"),
        ("def other(x): return x + 1", "failed: NameError: name 'successor' is not defined"),
        ("def successor(x): return [][x]", "failed: IndexError"),
        ("import numpy_is_not_here", "failed: ModuleNotFoundError"),
        ("def successor(x: List[int]): return x + 1", "failed: NameError: name 'List' is not defined"),
        ("def successor(x):\n    while True: pass", "timed out"),
        ("while True: pass", "timed out"),
        ("import time\ntime.sleep(100)", "timed out"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", ("failed: EOFError", "timed out")),
        ("print('x' * 10**7)\ndef successor(x): print(x); return x + 1", "passed"),
        ("def successor(x): return input()", "failed: EOFError"),
    ],
)
def test_results(isolation: Isolation, program: str, result: str | tuple[str, ...]) -> None:
    begun = time.monotonic()
    assert judged(isolation, program).result.startswith(result)
    assert time.monotonic() - begun < LIMITS.wall_seconds + 10


VALUES = [
    "None, True, 3, -(10**30), 1.5, float('inf'), -0.0, 'text \\ud800 \\x00', b'\\xff', 2j",
    "[1, [2, (3, {4: {'five'}})]], frozenset({1}), range(3), {(1, 2): [3]}, bytearray(b'x'), int, ()",
    "__import__('fractions').Fraction(1, 3), __import__('decimal').Decimal('0.1')",
    "deque([1, (2,)], 3), Counter('aab'), OrderedDict([(2, [1]), (1, 0)]), {2: [], 1: 0}.keys(), {2: 'b', 1: [0]}.items()",
    "datetime(2020, 1, 2, 3, tzinfo=timezone.utc), date(2020, 1, 2), time(1, 2), timedelta(-1, 2, 3)",
]


@pytest.mark.parametrize("values", VALUES)
def test_values_cross_as_they_are(isolation: Isolation, values: str) -> None:
    names = "from collections import Counter, OrderedDict, deque\nfrom datetime import date, datetime, time, timedelta, timezone\n"
    test = f"{names}values = [{values}]\nfor one, given in zip(values, same(values)):\n"
    test += "    assert one == given and type(one) is type(given)\n"
    test += f"    assert repr(one) == repr(given)\nassert made() == ({values},)\n"
    program = f"{names}def same(x): return x\ndef made(): return ({values},)\n"
    assert judged(isolation, program, test, "same").result == "passed"


def test_large_integers_cross(isolation: Isolation) -> None:
    test = "assert same(10**6000) == 10**6001 and same(-(10**6000)) == -(10**6001)"
    assert judged(isolation, "def same(x): return x * 10", test, "same").passed


def test_objects_and_changes_cross(isolation: Isolation) -> None:
    program = """
        import collections
        class Pair:
            def __init__(self, first): self.first = first
        def first(pair): return pair.first
        def sort(items): items.sort()
        def mark(table, names): table["new"] = 1; del table["old"]; names.discard(2)
        def count(items): return collections.Counter(items)
        def adder(n): return lambda x: x + n
        def numbers(n): yield from range(n)
        def apply(function, x): return function(x)
        def wrong(): raise KeyError("no")
    """
    test = """
assert first(Pair(5)) == 5
items = [3, 1, 2]
sort(items)
assert items == [1, 2, 3]
table, names = {"old": 0}, {1, 2}
mark(table, names)
assert table == {"new": 1} and names == {1}
assert count("aab") == {"a": 2, "b": 1}
assert adder(2)(3) == 5 and apply(adder(1), 1) == 2
assert list(numbers(3)) == [0, 1, 2]
try:
    wrong()
except KeyError:
    pass
else:
    raise AssertionError
"""
    assert judged(isolation, program, test, "first").result == "passed"


# Each a right solution that a test of plain Python passes, and whose test failed here.
PROTOCOLS = {
    "an argument by name": ("def f(items): items.append(2)", "items = [1]\nf(items=items)\nassert items == [1, 2]"),
    "what lies in an argument": (
        "def f(x): x[0].append(1); x[1]['new'].add(2); x.append(x[0]); x[2] = (x[0], 3)",
        "a, b = [], {'new': set()}\nx = [a, b, None]\nf(x)\nassert x == [[1], {'new': {2}}, ([1], 3), [1]]\n"
        "assert x[0] is a is x[3] is x[2][0] and x[1] is b",
    ),
    "what lies in a tuple": ("def f(x): x[0][1].append(1)", "a = deque([5])\nf(((0, a),))\nassert a == deque([5, 1])"),
    "what lies in a deque": ("def f(x): x[0].append(1)", "a = []\nx = deque([a])\nf(x)\nassert a == [1] and x[0] is a"),
    "a class": ("class C:\n    def __init__(self, n): self.n = n\ndef f(): return C", "assert f()(5).n == 5"),
    "inner lists that change places": (
        "def f(x): x.sort()",
        "a, b = [2], [1]\nx = [a, b]\nf(x)\nassert x[0] is b and x[1] is a == [2]",
    ),
    "a change before an error": (
        "def f(x): x.append(1); raise ValueError",
        "x = []\ntry: f(x)\nexcept ValueError: pass\nassert x == [1]",
    ),
    "an error of its own class": (
        "class E(ValueError): pass\ndef f(): raise E('no', 3)",
        "try: f()\nexcept ValueError as error: assert error.args == ('no', 3) and type(error).__name__ == 'E'",
    ),
    "an error that says something else": (
        "class E(ValueError):\n    def __str__(self): return 'said'\ndef f(): raise E(3)",
        "try: f()\nexcept ValueError as error: assert str(error) == 'said'",
    ),
    "arguments of an error": ("def f(): return {}['k']", "try: f()\nexcept KeyError as error: assert error.args == ('k',)"),
    "values of a dict": ("def f(): return {1: 2, 3: 2}.values()", "assert list(f()) == list(f()) == [2, 2] and len(f()) == 2"),
    "keys in their order": ("def f(): return {9: 0, 1: 0, 5: 0}.keys()", "assert list(f()) == [9, 1, 5] and f() == {1, 5, 9}"),
    "a Counter changed in place": (
        "def f(c): c['a'] += 1",
        "from collections import Counter\nc = Counter('aab')\nf(c)\nassert c == Counter('aaab')",
    ),
    "what is not counted": ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab')['z'] == 0"),
    "operators of its own class": (
        "class f:\n    def __init__(self, *items): self.items = items\n    def __len__(self): return len(self.items)\n"
        "    def __getitem__(self, n): return self.items[n]\n    def __eq__(self, other): return self.items == other.items\n",
        "assert f(1, 2) == f(1, 2) != f(1) and len(f(1)) == 1 and f(7)[0] == 7 and list(f(7, 8)) == [7, 8] and 8 in f(7, 8)\n"
        "assert f(1) and not f() and f(1) is not None",
    ),
    "an order of its own class": (
        "from functools import total_ordering\n@total_ordering\nclass f:\n    def __init__(self, n): self.n = n\n"
        "    def __eq__(self, other): return self.n == other.n\n    def __lt__(self, other): return self.n < other.n\n",
        "assert f(1) < f(2) > f(1) <= f(1) >= f(1) and not f(2) < f(1)\nassert max(f(1), f(3), f(2)).n == 3",
    ),
    "items that are set": (
        "class f:\n    def __init__(self): self.d = {}\n    def __getitem__(self, key): return self.d[key]\n"
        "    def __setitem__(self, key, value): self.d[key] = value\n",
        "x = f()\nx[1] = [2]\nassert x[1] == [2]",
    ),
    "a node without a length": ("class f: pass", "node = f()\nassert node and node == node"),
    "iterators": (
        "def f(*its, it=()): return [list(one) for one in (*its, it)]\n"
        "def g(): yield from (1, 2)\ndef h(x): return [next(i) for i in x]",
        "assert f(iter([1]), zip([1], [2]), map(abs, [-3, 2]), g(), it=iter('a')) == [[1], [(1, 2)], [3, 2], [1, 2], ['a']]\n"
        "x = [iter([1]), iter([2])]\nassert h(x) == [1, 2]",
    ),
    "an equal item in another's place": ("def f(x): x[0] = float(x[0])", "x = [1]\nf(x)\nassert type(x[0]) is float"),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_cross(isolation: Isolation, name: str) -> None:
    program, test = PROTOCOLS[name]
    test = "from collections import deque\n" + test
    exec(compile(f"{program}\n{test}", name, "exec", dont_inherit=True), {})  # by itself it passes
    assert judged(isolation, program, test, "f").result == "passed"


def test_operators_decide_nothing(isolation: Isolation) -> None:
    """An object that says yes to all is neither equal to a value nor holds one; what it raises has no more power than its kind."""
    yes = "class Yes:\n    def __eq__(self, other): return True\n    def __contains__(self, item): return True\n"
    yes += "    def __lt__(self, other): return True\n    def __gt__(self, other): return True\n"
    yes += "    def __len__(self): return self\n    def __iter__(self): yield self\n    def __getitem__(self, n): return self\n"
    for test in (
        "f() == 1",
        "1 == f()",
        "1 in f()",
        "f() in [1]",
        "f()[0] == 1",
        "0 < f() < 2",
        "len(f()) == 1",
        "[1] == list(f())",
        "f() == [f()]",
    ):
        exec(f"{yes}def f(): return Yes()\nassert {test.replace('len(f())', 'f()')}", {})  # it fools who runs both in one process
        assert not judged(isolation, f"{yes}def f(): return Yes()\n", f"assert {test}", "f").passed, test
    leaves = "class Leaves(SystemExit): pass\ndef f(): raise Leaves(0)\n"
    assert judged(isolation, leaves, "assert f() == 1", "f").result == "failed: CandidateError: Leaves: 0"
    stops = "def f(x): raise StopIteration"
    assert not judged(isolation, stops, "for got, want in zip(map(f, [1, 2]), [2, 3]): assert got == want", "f").passed


# Each has one test that takes any exception of the candidate's for the right answer to a bad argument.
UNANSWERED = {
    "dead": ("import os\ndef f(x): os._exit(0)", "EOFError: the other side has ended"),
    "endless": ("def f(x):\n    while True: pass", "timed out"),
    "too long an answer": ("def f(x): return 'a' * (17 << 20)", "Unsendable: a message of 17825806 bytes"),
    "too many items": ("import itertools\ndef f(x): return itertools.count()", "Unsendable: an iterator of more than 1000000"),
    "too deep an answer": ("def f(x):\n    for _ in range(5000): x = [x]\n    return x", "Unsendable: a value nested too deep"),
    "too deep a change": ("def f(x):\n    for _ in range(5000): x[0] = [x[0]]", "Unsendable: a value nested too deep"),
}


@pytest.mark.parametrize("name", UNANSWERED)
@pytest.mark.parametrize("caught", ["except Exception: assert False", "except: pass\nelse: assert False"])
def test_what_does_not_answer_raises_nothing_that_a_test_expects(isolation: Isolation, name: str, caught: str) -> None:
    program, result = UNANSWERED[name]
    said = judged(isolation, program, f"try: f([0])\n{caught}", "f").result
    assert said.removeprefix("failed: ").startswith(result)


def test_what_the_tests_cannot_hand_over_is_no_error_of_the_candidate_s(isolation: Isolation) -> None:
    for hand in ("f(object())", "f(x=object())", "f.field = object()", "f(deep)"):
        test = f"deep = []\nfor _ in range(5000): deep = [deep]\ntry: {hand}\nexcept Exception: pass\n"
        verdict = judged(isolation, "def f(x): return x", test, "f")
        assert verdict.result.startswith(("failed: Unsendable: the tests hand", "failed: RecursionError")), hand
    later = judged(isolation, "def f(x): return x", "try: f(object())\nexcept: pass\ntry: f(1)\nexcept BaseException: pass\n", "f")
    assert later.result.startswith("failed: Unsendable")


def test_a_name_is_there_or_is_not(isolation: Isolation) -> None:
    """`callable` held for what the program does not define, and Python's own `sum` would have been taken for the program's."""
    for entry, test in (("f", "assert callable(f)"), ("sum", "assert sum([1, 2]) == 3"), ("f", "class A: g = f\n")):
        assert judged(isolation, "pass", test, entry).result == f"failed: NameError: name '{entry}' is not defined", test
    program = "def f():\n    global later\n    def later(): return 1\n"
    assert judged(isolation, program, "class A: g = f\nA.g()\nassert later() == 1", "f").passed
    assert not judged(isolation, program, "later()", "f").passed


def test_annotations_are_python_s_own(isolation: Isolation) -> None:
    """Our own `from __future__ import annotations` had made them text, in what we compile too."""
    text = "def successor(x: int): return x + 1\n"
    test = "def helper(x: int): return x\nassert types_of() == {'x': int} == helper.__annotations__ == given.__annotations__\n"
    program = text + "def types_of(): return successor.__annotations__\n"
    assert judged(isolation, program, test, reference="def given(x: int): return x\n").result == "passed"


def test_helpers_are_the_reference_ones(isolation: Isolation) -> None:
    reference = "def helper(x): return x + 1\ndef successor(x): return x + 1\n"
    test = "assert successor(3) == helper(3)"
    lying = "def helper(x): return None\ndef successor(x): return None\n"
    right = "def successor(x): return x + 1\n"
    assert not judged(isolation, lying, test, reference=reference).passed
    assert judged(isolation, right, test, reference=reference).passed
    assert judged(isolation, lying, test).passed  # without a reference the names are the program's own


def test_modules_of_the_tests_are_python_s(isolation: Isolation) -> None:
    """A program that makes one up does not decide what its own answers are compared with."""
    lying = "class sys:\n    def getsizeof(x): return 1\ndef size(x): return 1\n"
    assert not judged(isolation, lying, "assert size((1, 2)) == sys.getsizeof((1, 2))", "size").passed
    program = "def copy(x): return [x]\ncopy.name = 'own'\n"
    assert judged(isolation, program, "assert copy(1) == [1] and copy.name == 'own'", "copy").passed


KILLED = """
import sys
from launch.evaluation.execution import execute
from launch.evaluation.job import Job
from launch.evaluation.sandbox.levels import Level
from launch.evaluation.sandbox.limits import Limits
job = Job(program="import time\\ndef f(): time.sleep(1000)", test="f()", entry_point="f")
execute(job, level=eval(sys.argv[1]), limits=Limits(seconds=1000), slot=1)
"""


@pytest.mark.parametrize("name", LEVELS)
def test_a_killed_evaluation_leaves_nothing_that_runs(name: str) -> None:
    try:
        level = find_isolation(name, LIMITS).level
    except UserError as error:
        pytest.skip(str(error))
    process = subprocess.Popen([sys.executable, "-c", KILLED, repr(level)])
    until = time.monotonic() + 60
    while len(family := descendants(process.pid)) < (5 if name == "limits" else 7) and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while (left := [one for one in family[1:] if runs(one)]) and time.monotonic() < until:
        time.sleep(0.1)
    for one in left:
        os.kill(one, signal.SIGKILL)
    assert len(family) > 4 and not left


def runs(process: int) -> bool:
    try:
        return process_stat(process)[0] != "Z"
    except OSError:
        return False


def test_a_sandbox_that_fails_is_no_verdict(isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A right program was called wrong where its judge could not reach it. What fails once is tried again."""
    job = Job(program="def f(): return 1", test="assert f() == 1", entry_point="f")
    with pytest.raises(SandboxError, match="3 times a sandbox ended before its program began"):
        execute(job, level=isolation.level, limits=Limits(memory=1 << 20), slot=os.getpid())  # less than an interpreter takes
    calls: list[Any] = []

    def lost_once(*arguments: Any, stdin: Any, **named: Any) -> Confined:
        calls.append(named["descriptors"])
        if len(calls) == 1:  # the candidate reads another file than the judge's pipe, as with a closed standard input
            named["descriptors"] = (stdin.fileno(), named["descriptors"][1])
        return start(*arguments, stdin=stdin, **named)

    monkeypatch.setattr(execution, "start", lost_once)
    assert execute(job, level=isolation.level, limits=LIMITS, slot=os.getpid()).passed and len(calls) == 4


def shell(command: str) -> Confined:
    process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE)
    return Confined(process=process, limits=LIMITS, leash=None, folder=None)


@pytest.mark.parametrize("then", ["", "exec sleep 60"])
def test_what_was_said_in_time_counts(then: str) -> None:
    """A worker that waited for others found the time over, and called what had long passed timed out."""
    judge = shell(f'echo; echo \'{{"passed": true, "result": "passed"}}\'; {then}')
    assert judge.process.stdout and select.select([judge.process.stdout], [], [], 20)[0]
    time.sleep(0.2)
    assert read_verdict(judge, judge, 0.0).passed
    silent = shell("echo; exec sleep 60")
    assert silent.process.stdout and select.select([silent.process.stdout], [], [], 20)[0]
    assert read_verdict(silent, silent, 0.0).result == "timed out"
    for one in (judge, silent):
        one.process.kill()
        one.process.wait()


def test_a_look_at_a_program_does_not_read_all_of_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a large host it took so long that right programs timed out."""
    top = shell("sh -c 'sleep 60 & echo; wait'; true")
    assert top.process.stdout and top.process.stdout.readline()
    by_scan = [top.process.pid]
    for one in by_scan:
        by_scan += [child for child, parent in parents().items() if parent == one]
    assert len(by_scan) == 3
    with monkeypatch.context() as patch:
        patch.setattr(process, "parents", dict)
        assert descendants(top.process.pid) == by_scan
    scans: list[dict[int, int]] = []
    monkeypatch.setattr(process, "parents", lambda: scans.append(parents()) or scans[-1])
    monkeypatch.setattr(process, "KERNEL_LIST", "/proc/nowhere")
    assert descendants(top.process.pid) == by_scan and scans
    for one in by_scan:
        os.kill(one, signal.SIGKILL)
    top.process.wait()


def test_a_program_and_its_judge_have_users_of_their_own_and_both_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[str, int]] = []

    def begun(*_: Any, role: str, slot: int, **__: Any) -> Any:
        return SimpleNamespace(end=lambda: ended.append((role, slot)))

    monkeypatch.setattr(execution, "start", begun)
    monkeypatch.setattr(execution, "read_verdict", lambda *_: Verdict(passed=True, result="passed"))
    job, level = Job(program="", test="", entry_point="f"), Level(name="limits", user_namespace=True, python="python")
    for slot in (0, 3):
        assert execution.attempt(job, level=level, limits=LIMITS, slot=slot).passed
    assert sorted(ended) == [("candidate", 0), ("candidate", 6), ("judge", 1), ("judge", 7)]


def test_no_two_programs_run_in_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    running, lock, three = list[int](), threading.Lock(), threading.Barrier(3)

    def execute(job: Job, *, slot: int, **_: Any) -> Verdict:
        with lock:
            assert slot not in running
            running.append(slot)
        three.wait(20)
        with lock:
            running.remove(slot)
        return Verdict(passed=True, result="passed")

    monkeypatch.setattr(execution, "execute", execute)
    jobs = [Job(program="", test="", entry_point="f")] * 21
    level = Level(name="limits", user_namespace=False, python="python")
    assert len(list(execute_all(jobs, level=level, limits=LIMITS, workers=3))) == 21


@pytest.mark.parametrize("greedy", ["candidate", "judge"])
def test_either_may_use_more_than_it_is_allowed(greedy: str) -> None:
    """The judge too: by what its candidate answers."""
    silent = shell("echo; exec sleep 60")
    assert silent.process.stdout and select.select([silent.process.stdout], [], [], 20)[0]
    of = {
        name: SimpleNamespace(process=silent.process, excess=lambda name=name: "memory" if name == greedy else None)
        for name in ("judge", "candidate")
    }
    try:
        said = read_verdict(of["judge"], of["candidate"], 60.0)  # type: ignore[arg-type]
    finally:
        silent.process.kill()
        silent.process.wait()
    assert said.result == "failed: more memory than the sandbox allows"


def test_a_text_is_handed_over_as_it_is() -> None:
    """Half a surrogate pair is no question mark, with which a wrong program might be a right one."""
    with execution.held_text("é\ud800") as file:
        assert file.read() == b"\xc3\xa9\xed\xa0\x80"


def test_many_at_once_in_order(isolation: Isolation) -> None:
    jobs = [Job(program=f"def f(): return {n}", test=f"assert f() == {n} and {n} % 3", entry_point="f") for n in range(12)]
    verdicts = list(execute_all(jobs, level=isolation.level, limits=LIMITS, workers=2))
    assert [verdict.passed for verdict in verdicts] == [bool(n % 3) for n in range(12)]


def test_evaluations_draw_slots_that_share_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 256 workers each, all had the same."""
    level, other = (Level(name="limits", user_namespace=way, python="python") for way in (False, True))
    monkeypatch.setattr("os.getuid", lambda: 0)
    for workers, ranges in ((64, 4), (100, 2), (1, 256), (256, 1)):
        drawn = {first_slot(level, workers) for _ in range(40 * ranges)}
        assert {slot % workers for slot in drawn} == {0} and 0 <= min(drawn) <= max(drawn) <= 256 - workers
        assert len(drawn) > ranges * 0.9, "no two programs at a time, of one evaluation or two, share a user"
    assert first_slot(other, 384) == 0  # there no user is taken


def test_the_probe_sees_missing_walls() -> None:
    """Its attempts, run in a plain process, find no wall; in the sandbox they find all that are said to hold."""
    code = "import json, sys, os\nfrom launch.evaluation.sandbox.inside import attempts\nc = json.loads(sys.argv[1])\n"
    code += "print(json.dumps({n: getattr(attempts, n)(c) for n in ('files', 'network', 'processes', 'memory', 'environment')}))"
    with targets() as extra:
        config = {**extra, "caller": os.getpid(), "most_processes": 30, "most_memory": 1 << 20, "folder": extra["open_folder"]}
        done = subprocess.run([sys.executable, "-c", code, json.dumps(config)], capture_output=True, text=True, check=True)
    assert not any(json.loads(done.stdout).values())
    found = find_isolation()
    assert probe(found.level, LIMITS) == found.holds


class Refused:
    """In the place of a module: all of its calls are refused, but those of the original that are named."""

    def __init__(self, module: Any, *allowed: str) -> None:
        self.module, self.allowed = module, allowed

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return self.refuse if callable(value) and name not in self.allowed else value

    @staticmethod
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError


@pytest.mark.parametrize("way", ["kill", "prlimit", "none"])
def test_each_way_to_another_process_opens_a_wall(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(attempts, "fork_many", lambda most: 0)
    for name in ("os", "resource"):
        monkeypatch.setattr(attempts, name, Refused(getattr(attempts, name), way))
    assert attempts.processes({"most_processes": 1, "caller": os.getpid()}) is (way == "none")


@pytest.mark.parametrize("way", ["chmod", "utime", "truncate", "none"])
def test_each_change_of_a_file_opens_a_wall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str) -> None:
    secret, own = tmp_path / "secret", tmp_path / "own"
    secret.touch()
    monkeypatch.setattr(attempts, "read", Refused.refuse)
    monkeypatch.setattr(attempts, "write", lambda path: None if path == str(own) else Refused.refuse())
    monkeypatch.setattr(attempts, "os", Refused(os, way, "stat"))
    config = {"secret_file": str(secret), "open_folder": str(tmp_path / "open"), "folder": str(tmp_path)}
    assert attempts.files(config) is (way == "none")


def test_a_datagram_opens_a_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "connect", Refused.refuse)
    with targets() as config:
        assert not attempts.network(config)
        os.unlink(config["socket_file"])
        assert attempts.network(config)


BLIND = """
import os, resource, signal, time
from launch.evaluation.sandbox.inside import warden
from launch.evaluation.sandbox.inside.system import PR_SET_CHILD_SUBREAPER, prctl
prctl(PR_SET_CHILD_SUBREAPER, 1)
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    if os.fork() == 0:
        os.setsid()
        os.closerange(0, 3)  # whose other ends are read until nobody holds these
        os.write(writing, str(os.getpid()).encode())
        time.sleep(20)
    os._exit(0)
os.waitpid(child, 0)
orphan = os.read(reading, 20).decode()
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
try:
    os.listdir("/proc")
except OSError as error:
    print(orphan, error.errno, flush=True)
signal.signal(signal.SIGALRM, lambda *_: resource.setrlimit(resource.RLIMIT_NOFILE, limit))
signal.setitimer(signal.ITIMER_REAL, 0.2)
warden.kill_descendants()
"""


def test_a_warden_that_can_open_no_file_ends_its_program_when_it_can() -> None:
    done = subprocess.run([sys.executable, "-c", BLIND], capture_output=True, text=True, timeout=60, check=False)
    orphan, error = map(int, done.stdout.split())
    left = runs(orphan)
    with suppress(ProcessLookupError):
        os.kill(orphan, signal.SIGKILL)
    assert (done.returncode, error, left) == (0, errno.EMFILE, False), done.stderr


def test_levels_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no isolation called chroot; there are: auto, bubblewrap, namespaces, limits"):
        find_isolation("chroot")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="no isolation called bubblewrap starts on this machine: it is not installed"):
        find_isolation("bubblewrap")


def test_tests_find_pythons_own_names_as_fast_as_ever(isolation: Isolation) -> None:
    """Each went through Python code of ours, and brute-force checks of right programs timed out."""
    test = TESTS + 'assert globals().get("abs") is abs and "candidate" not in globals()\n'
    assert judged(isolation, "def successor(x): return x + 1", test).passed

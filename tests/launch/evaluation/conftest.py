"""Problems of our own in the formats of HumanEval, its infilling sets and MBPP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "eval"


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


HUMANEVAL = [
    {
        "task_id": "Own/0",
        "entry_point": "rounded",
        "prompt": 'def half(x):\n    return x / 2\n\n\ndef rounded(x):\n    """Half of x, rounded down."""\n',
        "canonical_solution": "    return int(half(x) // 1)\n",
        "test": "def check(candidate):\n    assert candidate(7) == half(7) - 0.5 == 3\n    assert candidate(-3) == -2\n",
    },
    {
        "task_id": "Own/1",
        "entry_point": "vowels",
        "prompt": 'def vowels(text):\n    """The set of vowels in text."""\n',
        "canonical_solution": "    return set(text) & set('aeiou')\n",
        "test": "def check(candidate):\n    assert candidate('banana') == {'a'}\n    assert candidate('') == set()\n",
    },
    {
        "task_id": "Own/2",
        "entry_point": "twice",
        "prompt": 'def twice(items):\n    """Every item two times, in place."""\n',
        "canonical_solution": "    items[:] = [item for item in items for _ in range(2)]\n",
        "test": "def check(candidate):\n    items = [1, 2]\n    candidate(items)\n    assert items == [1, 1, 2, 2]\n",
    },
]
INFILLING = [
    {
        "task_id": "SingleLineInfilling/Own/0/L1",
        "entry_point": "total",
        "prompt": "def total(items):\n    result = 0\n",
        "suffix": "        result += item\n    return result\n",
        "canonical_solution": "    for item in items:\n",
        "test": "def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n",
    },
    {
        "task_id": "RandomSpanInfillingLight/Own/0/1",
        "entry_point": "total",
        "prompt": "def total(items):\n    return s",
        "suffix": "(items)\n",
        "canonical_solution": "um",
        "test": "def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n",
    },
]
MBPP = [
    {
        "task_id": 601,
        "text": "Write a function to add the numbers of a pair.",
        "code": "class Pair:\r\n    def __init__(self, *ab):\r\n        self.ab = ab\r\ndef add(pair):\r\n    return sum(pair.ab)",
        "test_list": ["assert add(Pair(1, 2)) == 3", "assert set([add(Pair(0, 0))]) == {0}"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
    {
        "task_id": 602,
        "prompt": "Write a function for the area of a circle.",
        "code": "import math\ndef area(r):\n    return math.pi * r * r",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(area(2), 12.566, rel_tol=0.001)"],
    },
    # As MBPP/126, 367 and 596: a function of a builtin's name, a tree that the tests build, a module that only the program imports.
    {
        "task_id": 603,
        "text": "Write a function to find the sum of common divisors.",
        "code": "def sum(a, b):\n    s = 0\n    for d in range(1, a + 1):\n        s += d * (a % d == 0 == b % d)\n    return s",
        "test_list": ["assert sum(10, 15) == 6", "assert sum(100, 150) == 93"],
    },
    {
        "task_id": 604,
        "text": "Write a function for the height of a tree.",
        "code": "class Node:\r\n    def __init__(self, data):\r\n        self.data, self.left, self.right = data, None, None\r\n"
        "def height(node):\r\n    return 1 + max(height(node.left), height(node.right)) if node else 0",
        "test_setup_code": "root = Node(1) \r\nroot.left = Node(2) \r\nroot.left.right = Node(4) \r\nleaf = Node(1)",
        "test_list": ["assert height(root) == 3", "assert (height(leaf), root.left.right.data, leaf.left) == (1, 4, None)"],
    },
    {
        "task_id": 605,
        "text": "Write a function to find the size of a tuple.",
        "code": "import sys\ndef size(x):\n    return sys.getsizeof(x)",
        "test_list": ["assert size((1, 2)) == sys.getsizeof((1, 2))"],
    },
]


@pytest.fixture(scope="session")
def problem_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("problems")
    (folder / "mbpp.json").write_text(json.dumps(MBPP))  # an array, as sanitized-mbpp.json is one
    return {
        "humaneval": write_lines(folder / "humaneval.jsonl", HUMANEVAL),
        "infilling": write_lines(folder / "infilling.jsonl", INFILLING),
        "mbpp": folder / "mbpp.json",
    }

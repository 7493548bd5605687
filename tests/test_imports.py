"""The house: imports run one way, without circles, over few floors; importing a module touches no network, GPU or file."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
from import_graph import circle, inside, longest_chain, module_graph, room_graph
from support import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("model", "data", "launch")
    for path in (ROOT / folder).rglob("*.py")
    # which import Triton, and are imported by an operator's first call on a GPU
    if path.parent.name != "kernels" or path.stem == "__init__" or find_spec("triton") is not None
)
WATCHED = """
import importlib, sys
def hook(event, arguments):
    if event in ("socket.connect", "os.mkdir", "os.rename"):
        raise RuntimeError(f"import did {event} {arguments}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        if "__pycache__" not in str(arguments[0]) and str(arguments[0]) != "/dev/null":
            raise RuntimeError(f"import opened {arguments[0]} for writing")
# What libraries do when they are first imported is theirs: first without the hook, then every module of ours once more with it.
for name in sys.argv[1:]:
    importlib.import_module(name)
for name in sys.argv[1:]:
    del sys.modules[name]
sys.addaudithook(hook)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not sys.modules["torch"].cuda.is_initialized()
"""


def test_modules_were_found() -> None:
    assert {"model.moe", "data.preprocess", "launch.train", "launch.benchmarks.data"} <= set(MODULES)


def test_imports_touch_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED, *MODULES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("package", "foreign"), [("model", ("data", "launch", "deepspeed")), ("data", ("model", "launch", "deepspeed"))]
)
def test_imports_run_one_way(package: str, foreign: tuple[str, ...]) -> None:
    names = [name for name in MODULES if name.split(".")[0] == package]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(foreign)


FLOORS = {"data": 5, "launch": 5}
#: Longest chain inside one sub-package, module by module.
FLOORS_OF_A_ROOM = {"data": 5, "launch": 7}


@pytest.mark.parametrize("package", ["model", *FLOORS])
def test_no_import_circle(package: str) -> None:
    assert circle(module_graph(package)) == []
    assert circle(room_graph(package)) == []


@pytest.mark.parametrize("package", FLOORS)
def test_few_floors(package: str) -> None:
    chain = longest_chain(room_graph(package))
    assert len(chain) <= FLOORS[package], " -> ".join(chain)


@pytest.mark.parametrize("package", FLOORS_OF_A_ROOM)
def test_few_floors_in_a_room(package: str) -> None:
    graph = module_graph(package)
    for room in room_graph(package):
        chain = longest_chain(inside(graph, room))
        assert len(chain) <= FLOORS_OF_A_ROOM[package], " -> ".join(chain)


def test_the_graph_sees_circles_and_floors() -> None:
    """The instrument itself: a circle is found, and a chain is as long as it is."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]
    assert "launch.engine" in room_graph("launch") and "data.sources.discover" in module_graph("data")["data.sources.lines"]

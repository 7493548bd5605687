"""Ways out of a sandbox, each tried at one level as the user who runs this, or without any sandbox.

python escapes.py LEVEL|none: prints as JSON which of them got out (exit code 3: there is no such level here). Only the standard
library, so that any user's Python runs it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from launch.evaluation.execution import execute  # noqa: E402
from launch.evaluation.job import Job  # noqa: E402
from launch.evaluation.sandbox.limits import Limits  # noqa: E402
from launch.evaluation.sandbox.probe import find_isolation  # noqa: E402

LIMITS = Limits(seconds=5, memory=256 << 20, temporary_size=16 << 20, file_size=4 << 20, temporary_files=1000)
INHERITED = 77  # a descriptor that the caller left open for whoever it starts

#: Body of `escape(t)`, which returns something true if it got out. t: what `targets` has.
ESCAPES = {
    "reads a file of the host": "return open(t['secret_file']).read()",
    "lists a folder of the host": "return os.listdir(t['open_folder']) or True",
    "writes where everybody may": "return open(t['open_folder'] + '/mark', 'w').write('x')",
    "removes where everybody may": "os.mkdir(t['open_folder'] + '/d'); os.rmdir(t['open_folder'] + '/d'); return True",
    "changes a mode": "os.chmod(t['secret_file'], 0o604); return os.stat(t['secret_file']).st_mode & 0o777 == 0o604",
    "changes times": "os.utime(t['secret_file'], (1, 1)); return os.stat(t['secret_file']).st_mtime == 1",
    "empties a file": "os.truncate(t['secret_file'], 0); return os.stat(t['secret_file']).st_size == 0",
    "touches, owns, watches, asks for attributes": "return reached(t['secret_file'], *FILE_CALLS)",
    "connects over TCP": "socket.create_connection(('127.0.0.1', t['port']), 1); return True",
    "connects to a socket file": "socket.socket(socket.AF_UNIX).connect(t['socket_file']); return True",
    "connects to an abstract socket": "socket.socket(socket.AF_UNIX).connect(t['abstract_name']); return True",
    "sends to a socket file": "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', t['datagrams']); return True",
    "has the caller's environment": "return os.environ.get('CALLERS_SECRET')",
    "reads an environment in /proc": "return any(b'CALLERS_SECRET' in text for text in read_all('environ'))",
    "reads a command line of the host": "return any(t['marker'].encode() in text for text in read_all('cmdline'))",
    "signals the caller": "os.kill(t['caller'], 0); return True",
    "limits, slows, moves the caller": "return reached(t['caller'], *PROCESS_CALLS)",
    "opens the caller's memory": "return bool(open(f\"/proc/{t['caller']}/mem\", 'rb'))",
    "opens the caller's descriptors": "return os.listdir(f\"/proc/{t['caller']}/fd\")",
    "has a descriptor of the caller": f"return os.read({INHERITED}, 100).decode()",
    "starts sixty processes": "return fork_many(60, 0) == 60",
    "allocates half a gigabyte": "return len(bytearray(512 << 20)) > 0",
    "allocates it in five processes": "return fork_many(5, 100 << 20) == 5",
    "writes a large file": "return open(t['own'] + '/large', 'wb').write(bytes(8 << 20)) > 0",
    "fills the disk": "[open(f\"{t['own']}/{n}\", 'wb').write(bytes(3 << 20)) for n in range(8)]; time.sleep(1); return True",
    "makes thousands of files": "[open(f\"{t['own']}/{n}\", 'w').close() for n in range(3000)]; time.sleep(1); return True",
    "opens hundreds of files": "return len([open('/dev/null') for n in range(200)])",
    "makes namespaces": "return libc.unshare(0x10020000) == 0",
    "makes shared memory": "n = libc.shmget(0, 4096, 0o600); return n >= 0 and (libc.shmctl(n, 0, None), True)",
    "looks for shared memory": "return libc.shmctl(0, 14, ctypes.create_string_buffer(256)) >= 0",  # SHM_INFO
    "makes a file of memory": "return os.memfd_create('x') > 0",
    "makes an internet socket": "return bool(socket.socket())",
    "leaves a message queue": "libc.mq_open(t['queue'].encode(), os.O_CREAT | os.O_RDWR, 0o600, None); return True",
    "leaves a daemon": "leave_daemon(t['marker']); return True",
}
MEMFD_SECRET = 447  # the same on every architecture; not every kernel has it
if ctypes.CDLL(None).syscall(MEMFD_SECRET, os.O_CLOEXEC) >= 0:
    ESCAPES["makes a file of secret memory"] = f"return libc.syscall({MEMFD_SECRET}, 0) >= 0"
FOR_ROOT = {
    "fills the disk with files that have no name": "return nameless(t['own'], 8, 3 << 20)",
    "becomes root": "os.setuid(0); return True",
    "raises its limits": "[resource.setrlimit(limit, (5000, 5000)) for limit in (resource.RLIMIT_NOFILE, 0)]; return 1",
    "opens the kernel's settings": "return bool(open('/proc/sys/kernel/hostname', 'a'))",
    "changes its root": "os.chroot('/'); return True",
    "writes to the system": "open('/usr/mark', 'w').close(); os.unlink('/usr/mark'); return True",
}
HELPERS = """
import ctypes, os, resource, signal, socket, sys, time

libc = ctypes.CDLL(None)

def watch(path):
    if libc.inotify_add_watch(libc.inotify_init(), path.encode(), 2) < 0:
        raise OSError

FILE_CALLS = [
    os.utime,
    lambda path: os.chown(path, os.getuid(), os.getgid()),
    watch,
    os.listxattr,
]
PROCESS_CALLS = [
    lambda process: resource.prlimit(process, resource.RLIMIT_CPU),
    lambda process: os.setpriority(0, process, os.getpriority(0, process)),
    lambda process: os.sched_setaffinity(process, os.sched_getaffinity(process)),
    lambda process: os.sched_setscheduler(process, os.SCHED_OTHER, os.sched_param(0)),
    lambda process: os.sched_setparam(process, os.sched_param(0)),
]

def reached(target, *calls):
    done = []
    for number, call in enumerate(calls):
        try:
            call(target)
            done.append(number)
        except OSError:
            pass
    return done

def read_all(name):
    for number in filter(str.isdigit, os.listdir('/proc')):
        try:
            yield open(f'/proc/{number}/{name}', 'rb').read() if int(number) != os.getpid() else b''
        except OSError:
            pass

def fork_many(most, memory):
    children, (read, write) = [], os.pipe()
    try:
        while len(children) < most:
            child = os.fork()
            if child == 0:
                held = b'x' * memory
                os.write(write, b'x')
                time.sleep(20)
                os._exit(0)
            children.append(child)
        for child in children:
            os.read(read, 1)
        time.sleep(1.0)
        return sum(os.waitpid(child, os.WNOHANG) == (0, 0) for child in children)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)

def nameless(folder, count, size):
    opened = []
    for number in range(count):
        opened.append(open(f'{folder}/{number}', 'wb', buffering=0))
        opened[-1].write(bytes(size))
        os.unlink(opened[-1].name)
    time.sleep(1)
    return True

def leave_daemon(marker):
    child = os.fork()
    if child == 0:
        os.setsid()
        for descriptor in (0, 1, 2):
            os.dup2(os.open('/dev/null', os.O_RDWR), descriptor)
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(60)', marker + '-daemon'])
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.3)
"""


def source(body: str) -> str:
    return f"{HELPERS}\ndef escape(t):\n    {body}\n"


def marked(text: str) -> list[int]:
    """Processes with this in their command line."""
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if text.encode() in Path(f"/proc/{number}/cmdline").read_bytes():
                found.append(int(number))
    return found


def left_behind(target: dict[str, Any]) -> bool:
    """Whether a daemon or a queue of messages is there, which then is ended or removed."""
    daemons = marked(target["marker"] + "-daemon")
    for process in daemons:
        os.kill(process, signal.SIGKILL)
    queue = ctypes.CDLL(None).mq_unlink(target["queue"].encode()) == 0
    return bool(daemons) or queue


@contextmanager
def targets() -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        (folder / "secret").write_text("a secret of the host")
        for name in ("open", "own"):
            (folder / name).mkdir()
            (folder / name).chmod(0o777)
        inet, named, abstract = socket.socket(), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        for one in (inet, named, abstract, datagrams):
            stack.enter_context(one)
        address = f"\0escapes-{os.getpid()}"
        inet.bind(("127.0.0.1", 0))
        named.bind(str(folder / "socket"))
        abstract.bind(address)
        for listener in (inet, named, abstract):
            listener.listen(16)
        datagrams.bind(str(folder / "datagrams"))
        for name in ("socket", "datagrams"):
            (folder / name).chmod(0o777)
        opened = stack.enter_context(open(folder / "secret"))
        os.dup2(opened.fileno(), INHERITED, inheritable=True)
        marker = f"escape-{os.getpid()}-{time.time_ns()}"
        yield {
            "secret_file": str(folder / "secret"),
            "open_folder": str(folder / "open"),
            "own": str(folder / "own"),
            "socket_file": str(folder / "socket"),
            "datagrams": str(folder / "datagrams"),
            "port": inet.getsockname()[1],
            "abstract_name": address,
            "caller": os.getpid(),
            "marker": marker,
            "queue": f"/{marker}",
        }


def without_sandbox(code: str, target: dict[str, Any]) -> bool:
    os.lseek(INHERITED, 0, 0)
    program = f"{code}\nimport json\nprint(bool(escape(json.loads(sys.argv[1]))))"
    command = [sys.executable, "-I", "-c", program, json.dumps(target)]
    done = subprocess.run(command, capture_output=True, text=True, pass_fds=(INHERITED,), check=False)
    return done.stdout.strip() == "True"


def in_sandbox(code: str, target: dict[str, Any], level: Any) -> bool:
    os.lseek(INHERITED, 0, 0)
    # In the sandbox the program's own folder is where it starts.
    test = f"t = { ({**target, 'own': '.'})!r}\nassert bool(escape(t))"
    return execute(Job(program=code, test=test, entry_point="escape"), level=level, limits=LIMITS, slot=os.getpid()).passed


def main(asked: str) -> None:
    isolation = find_isolation(asked) if asked != "none" else None
    level = isolation.level if isolation else None
    bodies = ESCAPES | (FOR_ROOT if os.getuid() == 0 else {})
    got_out = {}
    for name, body in bodies.items():
        with (
            targets() as target,
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", target["marker"]]) as other,
        ):
            code = source(body)
            got_out[name] = in_sandbox(code, target, level) if level else without_sandbox(code, target)
            left = left_behind(target)
            if name.startswith("leaves a"):
                got_out[name] = left
            other.kill()
    benign = Job(program="def twice(x):\n    return 2 * x\n", test="assert twice(21) == 42", entry_point="twice")
    works = level is None or execute(benign, level=level, limits=LIMITS, slot=os.getpid()).passed
    holds = isolation.holds if isolation else {}
    print(json.dumps({"got_out": got_out, "works": works, "holds": holds, "user": os.getuid()}))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(3)

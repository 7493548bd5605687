"""What a program does to itself before it runs what it was started for: another user, limits, fewer system calls.

Nothing of it can be taken back by what runs afterwards: limits are lowered for good, and the user has no privileges.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from typing import Any

from launch.evaluation.sandbox.inside import landlock, seccomp
from launch.evaluation.sandbox.inside.system import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, drop_capabilities, prctl


def confine(config: dict[str, Any]) -> None:
    """config: `user` (a number, or None to stay), `limits` of resource's names, `folder` to be in.

    Where no namespace hides the host's folders, `read_only` names those that may be read.
    """
    os.environ.clear()  # of what the interpreter and bubblewrap set
    os.chdir(config["folder"])
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, it is this process that goes
    if config["user"] is not None:
        os.setgroups([])
        os.setresgid(config["user"], config["user"], config["user"])
        os.setresuid(config["user"], config["user"], config["user"])
    drop_capabilities()
    for name, value in config["limits"].items():
        if hasattr(resource, name):  # some systems lack some
            # One second between the signal that says why (SIGXCPU) and the one that cannot be ignored.
            resource.setrlimit(getattr(resource, name), (value, value + (name == "RLIMIT_CPU")))
    prctl(PR_SET_DUMPABLE, 0)  # other processes of this user cannot look into this one
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    host = config["level"] == "limits"  # elsewhere namespaces hide its files and processes
    if host:
        landlock.restrict(config["read_only"], config["folder"])
    seccomp.restrict(host=host)

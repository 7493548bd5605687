"""Two hosts on one machine: a rank in each of two network namespaces, talking over a virtual link.

    python tests/faults/two_hosts.py SHARDS MODEL_CONFIG FOLDER

1. Both train to the end, and the losses are those of two ranks on one host.
2. The link is cut in the middle of a run: both sides end by themselves and name the cause.
3. The link is back, the same command again: the run goes on from its newest checkpoint to its end.

Prints one line a stage and exits with 0, or with 77 and the reason where namespaces are not permitted (it takes root).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_PERMITTED = 77
SPACES = (f"moe_a{os.getpid()}", f"moe_b{os.getpid()}")
LINKS = ("moeveth0", "moeveth1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CUT_LIMIT = 240  # seconds in which both sides must have ended after the cut


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def make_hosts() -> None:
    """Two namespaces and a link. Ends the script with 77 where the machine does not permit it."""
    try:
        for space in SPACES:
            ip("netns", "add", space)
        ip("link", "add", LINKS[0], "netns", SPACES[0], "type", "veth", "peer", "name", LINKS[1], "netns", SPACES[1])
        for space, link, address in zip(SPACES, LINKS, ADDRESSES, strict=True):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", space, "link", "set", link, "up")
            ip("-n", space, "link", "set", "lo", "up")
    except FileNotFoundError:
        refuse("there is no `ip` command (Debian's iproute2)")
    except subprocess.CalledProcessError as error:
        refuse(f"network namespaces are not permitted: {error.stderr.strip()}")


def refuse(reason: str) -> None:
    remove_hosts()
    print(f"not run: {reason}", flush=True)
    sys.exit(NOT_PERMITTED)


def remove_hosts() -> None:
    for space in SPACES:
        with suppress(subprocess.CalledProcessError, FileNotFoundError):
            ip("netns", "delete", space)


def start(rank: int, flags: list[str], log: Path) -> subprocess.Popen:
    """One rank on its host. CXX names no compiler: DeepSpeed's shared memory would bypass the link."""
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": ADDRESSES[0]}
    env.update(MASTER_PORT="29555", GLOO_SOCKET_IFNAME=LINKS[rank], CXX="/none", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    command = ["ip", "netns", "exec", SPACES[rank], sys.executable, "launch/train.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)


def start_both(flags: list[str], folder: Path) -> list[subprocess.Popen]:
    return [start(rank, flags, folder / f"host_{rank}.log") for rank in (0, 1)]


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise SystemExit(f"FAILED: {what} did not happen within {seconds:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - began


def losses(run: Path) -> dict[int, float]:
    with suppress(FileNotFoundError):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}
    return {}


def ended(ranks: list[subprocess.Popen]) -> bool:
    return all(rank.poll() is not None for rank in ranks)


def check(condition: bool, what: str, folder: Path) -> None:
    if not condition:
        logs = "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("host_*.log")))
        raise SystemExit(f"FAILED: {what}\n{logs}")


def stages(shards: str, model: str, folder: Path) -> None:
    common = [
        "--data",
        shards,
        "--model",
        model,
        "--sequence_length",
        "64",
        "--wandb",
        "disabled",
        "--eval_interval",
        "0",
    ]
    common += ["--log_interval", "1", "--deepspeed_config", "ds_configs/cpu_ep2_zero2.json", "--seed", "7"]

    ranks = start_both([*common, "--max_steps", "8", "--output", str(folder / "two")], folder)
    wait_for(lambda: ended(ranks), 120, "the end of a run over two hosts")
    check([rank.returncode for rank in ranks] == [0, 0], "a run over two hosts ends with 0", folder)
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_gpus", "2", "--master_port", "29556"]
    one = [*launcher, "launch/train.py", *common, "--max_steps", "8", "--output", str(folder / "one")]
    environment = {**os.environ, "CXX": "/none", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(one, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    check(len(losses(folder / "two")) == 8 and losses(folder / "two") == losses(folder / "one"), "equal losses", folder)
    print("two hosts train: 8 steps, losses equal to those of one host to the bit", flush=True)

    run = folder / "cut"
    flags = [*common, "--max_steps", "100000", "--save_interval", "5", "--output", str(run)]
    ranks = start_both(flags, folder)
    wait_for(lambda: max(losses(run), default=0) >= 12, 120, "step 12")
    ip("-n", SPACES[0], "link", "set", LINKS[0], "down")
    seconds = wait_for(lambda: ended(ranks), CUT_LIMIT, "the end of both sides after the cut")
    reached = max(losses(run))
    for rank in (0, 1):
        text = (folder / f"host_{rank}.log").read_text()
        check(ranks[rank].returncode not in (0, None), f"host {rank} ends with an error", folder)
        last = [line for line in text.splitlines() if line.startswith("error")]
        check(bool(last) and "rank" in last[-1] and "step" in last[-1], f"host {rank} names rank and step", folder)
        print(
            f"link cut at step {reached}: host {rank} ended (code {ranks[rank].returncode}): {last[-1][:160]}",
            flush=True,
        )
    print(f"both sides had ended {seconds:.0f} s after the cut", flush=True)

    ip("-n", SPACES[0], "link", "set", LINKS[0], "up")
    ranks = start_both([*flags, "--stop_after", str(reached + 10)], folder)
    wait_for(lambda: ended(ranks), 120, "the end of the restarted run")
    check([rank.returncode for rank in ranks] == [0, 0], "the restarted run ends with 0", folder)
    text = (folder / "host_0.log").read_text()
    check("resuming from" in text and max(losses(run)) == reached + 10, "the restarted run goes on", folder)
    print(
        f"link back: {next(line for line in text.splitlines() if 'resuming from' in line)}, on to {reached + 10}",
        flush=True,
    )


def main() -> None:
    shards, model, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_hosts()
    try:
        stages(shards, model, folder)
    finally:
        for space in SPACES:
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False).stdout.split()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
        remove_hosts()


if __name__ == "__main__":
    main()

"""Ctrl-C in a real terminal, in a real shell, under the real `deepspeed` launcher."""

from __future__ import annotations

import os
import pty
import select
import shlex
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import TRAIN, Site, last_saved, struck
from support import ROOT, deepspeed_command, metrics

from data.lock import FolderLock

PROMPT, BLOCK = "ready>", 1 << 15


class Terminal:
    """An interactive bash on a pseudo-terminal; `text` is all that came out."""

    def __init__(self, **env: str) -> None:
        self.text = ""
        pid, self.master = pty.fork()
        if not pid:
            os.chdir(ROOT)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**os.environ, **env, "PS1": PROMPT, "TERM": "dumb"})
        self.pid = pid
        self.until(PROMPT)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, text: str, seconds: float = 240, start: int = 0) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.text[start:]:
            self.read()
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.text[-6000:]}"

    def read(self) -> None:
        if select.select([self.master], [], [], 0.1)[0]:
            self.text += os.read(self.master, 1 << 16).decode(errors="replace")

    def close(self) -> None:
        os.close(self.master)
        os.waitpid(self.pid, 0)


def wandb_steps(run: Path) -> list[int]:
    """The steps in W&B's own file, as `wandb sync` would upload them."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="W&B is not installed")
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    items = [item for data in leveldb_records(path.read_bytes()) for item in records.Record.FromString(data).history.item]
    return [int(item.value_json) for item in items if (item.key or "/".join(item.nested_key)) == "step"]


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """LevelDB's log format behind W&B's 7 bytes: blocks of parts, each with checksum, length, and whole, first, middle or last."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.slow
def test_ctrl_c_is_one_clean_end(site: Site, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = site.flags(run, max_steps=100_000, save_interval=100_000, eval_interval=0, wandb="offline", stall_timeout=120)
    command = shlex.join([*deepspeed_command(2), TRAIN, *flags])
    terminal = Terminal(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", WANDB_ERROR_REPORTING="false")
    try:
        terminal.type(f"{command}; echo code=$((10 + $?))\n")
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
            terminal.read()
            assert time.monotonic() < deadline, terminal.text[-6000:]
        before = len(terminal.text)
        terminal.type("\x03")
        terminal.until("SIGINT: saving after this step", start=before)
        terminal.until("code=1", start=before)
        saved = last_saved(run)
        terminal.until(PROMPT, start=before)
        assert "code=10" in terminal.text[before:], "exit code 0: all is saved"
        assert "Traceback" not in terminal.text and "KeyboardInterrupt" not in terminal.text, terminal.text[before:]
        assert "everything lies in" in terminal.text[before:] and terminal.text.count("SIGINT: saving") == 1
        lock = FolderLock(run)
        assert lock.take(), "no rank is left when the prompt is back"
        lock.release()
        assert saved == f"step_{metrics(run)[-1]['step']}"
        logged = [row["step"] for row in metrics(run) if "loss" in row]
        assert set(logged) <= set(wandb_steps(run)), "W&B has every row, the last ones too"
        terminal.type("read -r line; echo got=$line\nword\n")
        terminal.until("got=word", seconds=20)  # the shell has its terminal back
        struck("Ctrl-C under the launcher, on a terminal")
    finally:
        terminal.close()

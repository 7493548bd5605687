"""The job as a whole: the same bytes from any number of workers and ranks, after any kill; one sentence for a mistake."""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from data_helpers import command, contents, environment, read_documents, run, write_rows
from tokenizers import Tokenizer

from data.pipeline.job import Job
from data.shards import SPLITS
from data.sources import blocks


def test_tokens_are_those_of_the_tokenizers_library_in_input_order(
    expected: Path, corpus: Path, texts: list[str], tokenizer_text: str
) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_text)
    order = [t for n in range(3) for t in texts[n::3]]
    right = [[*tokenizer.encode(t).ids, 0] for t in order]
    train, validation = read_documents(expected), read_documents(expected, "validation")
    assert len(train) > 30 and len(validation) > 5 and len(train) + len(validation) == len(texts)
    assert [d for d in right if d in train] == train and [d for d in right if d in validation] == validation


def test_manifest_counts_what_the_files_hold(expected: Path, texts: list[str], tokenizer_text: str) -> None:
    import hashlib

    tokenizer = Tokenizer.from_str(tokenizer_text)
    manifest = json.loads((expected / "manifest.json").read_text())
    assert manifest["documents"]["read"] == len(texts) and manifest["dtype"] == "uint16"
    assert sum(s["text_bytes"] for s in manifest["splits"].values()) == sum(len(t.encode()) for t in texts)
    for split, entry in manifest["splits"].items():
        for shard in entry["shards"]:
            data = (expected / split / f"{shard['name']}.bin").read_bytes()
            assert len(data) == shard["bytes"] == 2 * shard["tokens"]
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        documents = read_documents(expected, split)
        assert entry["documents"] == len(documents) and entry["tokens"] == sum(map(len, documents))
        assert entry["text_bytes"] == sum(len(tokenizer.decode(d[:-1], skip_special_tokens=False).encode()) for d in documents)


def test_twenty_kills_at_random_moments_end_with_the_same_bytes(expected: Path, flags: list[object], tmp_path: Path) -> None:
    """In this file system and process by process, as a machine would: SIGKILL, no warning, then the same command."""
    output, rng = tmp_path / "out", random.Random(3)
    started = time.monotonic()
    done = run(*flags, "--output", tmp_path / "timed", "--workers", 1)
    whole = time.monotonic() - started
    kills = partial = 0
    while kills < 20 or partial <= 3:
        assert kills < 100, "no kill fell into the writing"
        process = subprocess.Popen(command(*flags, "--output", output, "--workers", 1), env=environment())
        time.sleep(rng.uniform(0.4, 1.0) * whole)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        else:
            whole *= 0.9  # the machine was busier when it was timed
        process.wait()
        if (output / "manifest.json").exists():
            assert contents(output) == contents(expected) or (output / "state.json").exists()
            shutil.rmtree(output)
        elif list(output.glob("train/*.bin")):
            partial += 1
        else:
            whole *= 1.05  # and here less busy
    done = run(*flags, "--output", output, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(expected)


@pytest.mark.parametrize("full", SPLITS)
def test_the_end_of_a_shard_of_either_split_is_told(full: str) -> None:
    """The job saves its state then, for a shard is hours of work."""

    class Writer:
        def __init__(self, split: str) -> None:
            self.split = split

        def add(self, tokens: np.ndarray, sizes: np.ndarray, text_bytes: np.ndarray) -> bool:
            assert len(tokens) == len(sizes) == len(text_bytes) == 1
            return self.split == full

    ones = np.ones(2, np.int32)
    result: Any = SimpleNamespace(
        tokens=ones, sizes=ones, parts=ones, text_bytes=ones, rearranged=ones, validation=np.array([True, False]),
        rejected=[], removed=[], read=2, cut=0, after=None, done_bytes=0,
    )  # fmt: skip
    one: Any = SimpleNamespace(
        check_readable=list, reject=list, counts=Counter(), writers={split: Writer(split) for split in SPLITS},
        duplicates=SimpleNamespace(fresh=lambda _: np.ones(2, bool)),
    )  # fmt: skip
    assert Job.consume(one, result) is True and one.counts["fill_in_the_middle"] == 2


def crash_points(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the n-th durable step (fsync or rename) the last one: `remaining[0]` counts down. Small blocks: many saved states."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 30_000)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 10_000)
    remaining = [10**9]

    class Killed(BaseException):
        pass

    def counted(real: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            remaining[0] -= 1
            if remaining[0] < 0:
                raise Killed
            return real(*args, **kwargs)

        return step

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    return remaining


def test_durable_steps_can_be_the_last(
    corpus: Path, tokenizer_file: Path, tmp_path: Path, preprocess: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systematic where the kills above are random: stop before every third fsync or rename, resume, compare."""
    flags = ["--input", corpus / "file-0.json.gz", "--tokenizer", tokenizer_file]
    flags += ["--shard_tokens", 9000, "--validation_fraction", 0.2]
    remaining = crash_points(monkeypatch)
    assert preprocess(*flags, "--output", tmp_path / "whole")[0] == 0
    steps = 10**9 - remaining[0]
    assert steps > 60
    right = contents(tmp_path / "whole")
    for stop in range(0, steps, 3):
        output = tmp_path / f"stop{stop}"
        remaining[0] = stop
        with pytest.raises(BaseException) as error:
            preprocess(*flags, "--output", output)
        assert type(error.value).__name__ == "Killed"
        remaining[0] = 10**9
        code, _, err = preprocess(*flags, "--output", output)
        assert code == 0, f"stopped before durable step {stop} of {steps}: {err}"
        assert contents(output) == right, f"stopped before durable step {stop} of {steps}"
        shutil.rmtree(output)


def test_what_a_stopped_job_has_seen_and_counted_is_known_again(
    tmp_path: Path, tokenizer_file: Path, preprocess: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents that are duplicates of such before the stop, exact and near, and those rejected and removed before it."""
    rng, remaining = random.Random(4), crash_points(monkeypatch)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1500)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 500)
    texts = ["\n".join(f"w{rng.randrange(10**6)}" for _ in range(100)) for _ in range(12)]
    bad: list[Any] = [{"content": 5}, {"content": "# autogenerated\nx = 1\n"}]
    first, second = ([{"content": text} for text in half] for half in (texts[:6], texts[6:]))
    again, anew = ([{"content": text + end} for text in texts[:3] for end in ("", word)] for word in ("\nmore", "\nother"))
    rows = [*bad, *first, *again, *bad, *second, *anew, *bad]
    path = write_rows(tmp_path / "x.jsonl", rows)
    flags = ["--input", path, "--tokenizer", tokenizer_file, "--shard_tokens", 500, "--validation_fraction", 0]
    flags += ["--dedup", "near", "--filter", "codeparrot"]
    code, _, err = preprocess(*flags, "--output", tmp_path / "whole")
    assert code == 0, err
    steps, right = 10**9 - remaining[0], contents(tmp_path / "whole")
    documents = json.loads(right["manifest.json"])["documents"]
    assert documents["removed"] == {"autogenerated": 3, "exact duplicate": 6, "near duplicate": 6}
    assert documents["rejected"] == {"content is not a string": 3} and len(read_documents(tmp_path / "whole")) == 12
    gone_on_from = []
    for share in (0.6, 0.9):
        output, remaining[0] = tmp_path / f"stopped{share}", int(share * steps)
        with pytest.raises(BaseException) as error:
            preprocess(*flags, "--output", output)
        assert type(error.value).__name__ == "Killed"
        gone_on_from.append(json.loads((output / "state.json").read_text())["counts"]["read"])
        remaining[0] = 10**9
        assert preprocess(*flags, "--output", output)[0] == 0
        assert contents(output) == right
    assert 5 < gone_on_from[0] < gone_on_from[-1] < len(rows)


def test_on_error_fail_names_file_and_line(tmp_path: Path, tokenizer_file: Path, preprocess: Any) -> None:
    """And the same command with --on_error skip takes the folder up."""
    path = write_rows(tmp_path / "x.jsonl", [{"content": "a = 1\n"}, {"content": 5}, {"content": "b = 2\n"}])
    flags = ["--input", path, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--validation_fraction", 0]
    code, _, err = preprocess(*flags, "--on_error", "fail")
    assert code == 2 and f"{path} line 2: content is not a string" in err and err.count("\n") == 1
    code, out, _ = preprocess(*flags)
    assert code == 0 and "rejected 1: content is not a string" in out
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert row == {"file": str(path), "line": 2, "reason": "content is not a string"}
    assert len(read_documents(tmp_path / "out")) == 2


def test_an_empty_source_file_is_no_fault(tmp_path: Path, tokenizer_file: Path, preprocess: Any) -> None:
    """Every package has an empty `__init__.py`, and no tree could be read with `--on_error fail`."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").write_text("")
    (tmp_path / "src" / "a.py").write_text("a = 1\n")
    flags = ["--input", f"tree:{tmp_path / 'src'}", "--tokenizer", tokenizer_file, "--on_error", "fail"]
    code, out, err = preprocess(*flags, "--output", tmp_path / "out")
    assert code == 0 and "rejected 1: empty" in out, err


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"arguments": 1}', '{"_fingerprint": "x"}'])
def test_a_folder_with_a_state_of_somebody_else_is_no_job(
    content: str, tmp_path: Path, tokenizer_file: Path, corpus: Path, preprocess: Any
) -> None:
    """`save_to_disk` of datasets writes a state.json, and so does a checkpoint of ours."""
    (tmp_path / "state.json").write_text(content)
    before = sorted(tmp_path.iterdir())
    code, _, err = preprocess("--input", corpus, "--tokenizer", tokenizer_file, "--output", tmp_path)
    assert code == 2 and "state.json that is no job's of ours" in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "state.json").read_text() == content


def test_ctrl_c_is_one_sentence_and_the_job_goes_on(corpus: Path, texts: list[str], flags: list[object], tmp_path: Path) -> None:
    # Long enough to be interrupted on any machine.
    larger = tmp_path / "larger"
    shutil.copytree(corpus, larger)
    write_rows(larger / "more.json.gz", [{"content": f"# {n}\n{text}"} for n in range(100) for text in texts])
    flags = [larger if flag == corpus else flag for flag in flags] + ["--dedup", "exact"]
    process = subprocess.Popen(
        command(*flags, "--output", tmp_path / "out", "--workers", 2),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
    )
    while not (tmp_path / "out" / "state.json").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    assert process.returncode == 130 and "goes on" in err
    for name, workers in (("out", 1), ("undisturbed", 2)):
        assert run(*flags, "--output", tmp_path / name, "--workers", workers).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_full_disk_is_one_sentence_and_the_job_goes_on(expected: Path, flags: list[object], tmp_path: Path) -> None:
    """RLIMIT_FSIZE: a write beyond it fails as on a full disk. The tokenizer fits, a shard does not."""
    output = tmp_path / "out"
    limit = max(p.stat().st_size for p in (expected / "tokenizer").iterdir()) + 1000
    assert limit < max(p.stat().st_size for p in (expected / "train").iterdir())
    done = subprocess.run(
        command(*flags, "--output", output, "--workers", 1),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2 and "make room" in done.stderr and "Traceback" not in done.stderr
    assert not (output / "manifest.json").exists()
    assert run(*flags, "--output", output, "--workers", 1).returncode == 0
    assert contents(output) == contents(expected)


class Disk:
    """What a power cut would leave of a folder: contents that were fsynced, under names whose folder was fsynced afterwards.

    Strict, as POSIX allows: an fsync of a file does not keep its name. Follows os.fsync alone.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}  # by inode
        self.names: dict[Path, dict[str, tuple[int, bool]]] = {}  # of a folder: (inode, is a folder)
        self.steps, self.cut_at = 0, -1
        real = os.fsync

        def fsync(handle: int) -> None:
            if self.steps == self.cut_at:
                raise PowerCut
            self.steps += 1
            real(handle)
            self.remember(Path(os.readlink(f"/proc/self/fd/{handle}")), handle)

        monkeypatch.setattr(os, "fsync", fsync)

    def remember(self, path: Path, handle: int) -> None:
        if path.is_dir():
            self.names[path] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        else:
            self.contents[os.fstat(handle).st_ino] = os.pread(handle, 1 << 30, 0) if self.readable(handle) else path.read_bytes()

    @staticmethod
    def readable(handle: int) -> bool:
        return fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR

    def restore(self, target: Path) -> None:
        """What is on the disk, as a folder."""
        target.mkdir()
        self._restore(self.root, target)

    def _restore(self, folder: Path, target: Path) -> None:
        for name, (inode, is_folder) in self.names.get(folder, {}).items():
            if is_folder:
                (target / name).mkdir()
                self._restore(folder / name, target / name)
            else:
                (target / name).write_bytes(self.contents.get(inode, b""))


class PowerCut(BaseException):
    pass


def test_a_power_cut_at_any_moment_loses_nothing_that_was_promised(
    corpus: Path, tokenizer_file: Path, tmp_path: Path, preprocess: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what was fsynced comes back; the same command goes on from there to the same bytes."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 30_000)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 10_000)
    flags = ["--input", corpus / "file-0.json.gz", "--tokenizer", tokenizer_file]
    flags += ["--shard_tokens", 9000, "--validation_fraction", 0.2]
    output, goes_on = tmp_path / "out", 0
    with monkeypatch.context() as patch:
        whole = Disk(patch, output)
        assert preprocess(*flags, "--output", output)[0] == 0
    right = contents(output)
    assert whole.steps > 60
    for cut in range(1, whole.steps, 5):
        shutil.rmtree(output)
        with monkeypatch.context() as patch:
            disk = Disk(patch, output)
            disk.cut_at = cut
            with pytest.raises(PowerCut):
                preprocess(*flags, "--output", output)
        shutil.rmtree(output)
        disk.restore(output)
        state = output / "state.json"
        goes_on += state.exists() and "position" in json.loads(state.read_text())
        code, _, err = preprocess(*flags, "--output", output)
        assert code == 0, f"power cut before fsync {cut} of {whole.steps}: {err}"
        assert contents(output) == right, f"power cut before fsync {cut} of {whole.steps}"
    assert goes_on > 5, "no cut fell behind a saved state"

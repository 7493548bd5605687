"""The job as a whole: the same bytes from any number of workers and ranks, after any kill; one sentence for a mistake."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data_helpers import command, contents, environment, read_documents, run, write_rows
from tokenizers import Tokenizer

from data import readers


@pytest.fixture(scope="module")
def flags(corpus: Path, tokenizer_file: Path) -> list[object]:
    """A job of some ten shards over three files, with everything on that keeps state."""
    data = ["--input", corpus, "--tokenizer", tokenizer_file]
    return [*data, "--shard_tokens", 20_000, "--validation_fraction", 0.2, "--dedup", "near"]


@pytest.fixture(scope="module")
def expected(flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("expected") / "out"
    done = run(*flags, "--output", output, "--workers", 1)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((output / "manifest.json").read_text())
    assert len(manifest["splits"]["train"]["shards"]) > 5 and len(manifest["splits"]["validation"]["shards"]) > 1
    assert sorted(p.name for p in output.iterdir()) == ["manifest.json", "rejected.jsonl", "tokenizer", "train", "validation"]
    return output


def test_tokens_are_those_of_the_tokenizers_library_in_input_order(
    expected: Path, corpus: Path, texts: list[str], tokenizer_text: str
) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_text)
    order = [t for n in range(3) for t in texts[n::3]]
    right = [[*tokenizer.encode(t).ids, 0] for t in order]
    train, validation = read_documents(expected), read_documents(expected, "validation")
    assert len(train) > 30 and len(validation) > 5 and len(train) + len(validation) == len(texts)
    assert [d for d in right if d in train] == train and [d for d in right if d in validation] == validation


def test_manifest_counts_what_the_files_hold(expected: Path, texts: list[str]) -> None:
    import hashlib

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


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_workers(expected: Path, flags: list[object], tmp_path: Path, workers: int) -> None:
    done = run(*flags, "--output", tmp_path / "out", "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(expected)


def mpiexec() -> str:
    found = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip("no mpiexec (pip install mpich)")
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_do_not_depend_on_mpi_ranks(expected: Path, flags: list[object], tmp_path: Path, ranks: int) -> None:
    done = run(*flags, "--output", tmp_path / "out", prefix=(mpiexec(), "-n", str(ranks)))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(expected)


def test_a_mistake_under_mpi_is_one_sentence_and_no_hang(tokenizer_file: Path, tmp_path: Path) -> None:
    done = run("--input", tmp_path / "no", "--output", tmp_path / "o", "--tokenizer", tokenizer_file, prefix=(mpiexec(), "-n", "2"))
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


def test_an_error_in_the_middle_under_mpi_ends_all_ranks(tmp_path: Path, tokenizer_file: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"content": "a = 1\n"}, {"content": 5}])
    flags = ["--input", path, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--on_error", "fail"]
    done = run(*flags, prefix=(mpiexec(), "-n", "3"))
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "x.jsonl line 2" in done.stderr


def test_twenty_kills_at_random_moments_end_with_the_same_bytes(expected: Path, flags: list[object], tmp_path: Path) -> None:
    """In this file system and process by process, as a machine would: SIGKILL, no warning, then the same command."""
    output, rng = tmp_path / "out", random.Random(3)
    started = time.monotonic()
    done = run(*flags, "--output", tmp_path / "timed", "--workers", 1)
    whole = time.monotonic() - started
    kills = partial = 0
    while kills < 20:
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
        else:
            partial += bool(list(output.glob("train/*.bin")))
    assert partial > 3, "no kill fell into the writing"
    done = run(*flags, "--output", output, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(expected)


def crash_points(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the n-th durable step (fsync or rename) the last one: `remaining[0]` counts down. Small blocks: many saved states."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 30_000)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 10_000)
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


def test_a_finished_job_is_left_alone(expected: Path, flags: list[object], preprocess: Any) -> None:
    before = contents(expected)
    code, out, _ = preprocess(*flags, "--output", expected)
    assert code == 0 and "complete" in out and contents(expected) == before


@pytest.mark.parametrize("state", ["complete", "begun"])
def test_other_arguments_are_refused_with_the_difference(
    state: str, expected: Path, flags: list[object], tmp_path: Path, preprocess: Any, corpus: Path
) -> None:
    folder, own = tmp_path / "out", tmp_path / "corpus"
    shutil.copytree(corpus, own)
    flags = ["--input", own, *flags[2:]]
    if state == "complete":
        assert preprocess(*flags, "--output", folder)[0] == 0
    else:
        shutil.copytree(expected, folder)
    if state == "begun":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").unlink()
        listing = [[str(own / Path(name).name), size, files] for name, size, files in manifest["arguments"]["input_files"]]
        arguments = manifest["arguments"] | {"input": [str(own)], "input_files": listing}
        (folder / "state.json").write_text(json.dumps({"arguments": arguments}))
        (folder / ".lock").touch()
    before = contents(folder)
    code, _, err = preprocess(*flags, "--output", folder, "--max_document_bytes", 5000)
    assert code == 2 and "--max_document_bytes was 1000000, now 5000" in err
    write_rows(own / "file-9.json", [{"content": "x = 1\n"}])
    code, _, err = preprocess(*flags, "--output", folder)
    assert code == 2 and "the input changed" in err and "file-9.json" in err
    assert contents(folder) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path, flags: list[object], preprocess: Any) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "precious").write_text("x")
    code, _, err = preprocess(*flags, "--output", tmp_path)
    assert code == 2 and "not empty" in err and (tmp_path / "train" / "precious").exists()


def test_two_jobs_on_one_folder(tmp_path: Path, flags: list[object], preprocess: Any) -> None:
    """The first is stopped as soon as it holds the folder; killed, it holds it no longer, whatever its workers do."""
    first = subprocess.Popen(
        command(*flags, "--output", tmp_path / "out", "--workers", 2), env=environment(), stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "out" / "tokenizer" / "tokenizer_config.json").exists():
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    code, _, err = preprocess(*flags, "--output", tmp_path / "out")
    assert code == 2 and "another job" in err
    first.kill()
    first.wait()
    assert preprocess(*flags, "--output", tmp_path / "out")[0] == 0


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "nowhere"], "no input at nowhere"),
        (["--shard_tokens", "0"], "--shard_tokens must be at least 1"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--validation_fraction", "1.5"], "--validation_fraction must be from 0 to 1"),
        (["--fim_rate", "-1"], "--fim_rate must be from 0 to 1"),
        (["--tokenizer", "/nowhere/tokenizer.json"], "no tokenizer at /nowhere"),
        (["--decontaminate", "/nowhere.jsonl"], "--decontaminate /nowhere.jsonl"),
        (["--dedup", "fuzzy"], "invalid choice"),
        (["--no_such_flag"], "unrecognized arguments"),
        (["--text_field", "body"], "no documents in"),
    ],
)
def test_a_mistake_is_one_sentence(
    flags: list[str], message: str, corpus: Path, tokenizer_file: Path, tmp_path: Path, preprocess: Any
) -> None:
    usual = ["--input", corpus, "--tokenizer", tokenizer_file, "--output", tmp_path / "out"]
    code, _, err = preprocess(*usual, *flags)
    assert code == 2 and message in err and "Traceback" not in err
    # Nothing is left that would refuse the corrected command.
    assert preprocess(*usual, "--validation_fraction", 0)[0] == 0


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


def test_workers_die_with_a_killed_job_and_a_killed_worker_is_a_sentence(flags: list[object], tmp_path: Path) -> None:
    def children(pid: int) -> list[int]:
        found = []
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def alive(pid: int) -> bool:
        status = Path(f"/proc/{pid}/stat")
        return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    for victim in ("job", "worker"):
        # A worker's start takes some 0.5 s: long enough to be found in it.
        process = subprocess.Popen(
            command(*flags, "--output", tmp_path / victim, "--workers", 2), env=environment(), stderr=subprocess.PIPE, text=True
        )
        while len(found := children(process.pid)) < 2 and process.poll() is None:
            time.sleep(0.01)
        assert len(found) >= 2
        os.kill(process.pid if victim == "job" else found[-1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        deadline = time.monotonic() + 20
        while any(map(alive, found)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, found))
        if victim == "worker":
            assert process.returncode == 2 and "a worker process was killed" in err and "Traceback" not in err


def test_long_documents_are_split_at_line_ends_and_counted(
    tmp_path: Path, tokenizer_file: Path, tokenizer_text: str, preprocess: Any
) -> None:
    text = "".join(f"line {i} = {i * i}\n" for i in range(300))
    path = write_rows(tmp_path / "x.jsonl", [{"content": text}, {"content": "y" * 2000}])
    flags = ["--input", path, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--validation_fraction", 0]
    code, out, _ = preprocess(*flags, "--max_document_bytes", 1000)
    assert code == 0 and "a line of the text is longer than --max_document_bytes 1000" in out
    documents = read_documents(tmp_path / "out")
    tokenizer = Tokenizer.from_str(tokenizer_text)
    parts = [tokenizer.decode(d[:-1]) for d in documents]
    assert "".join(parts) == text and len(parts) > 4 and all(len(p) <= 1000 and p.endswith("\n") for p in parts)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["documents"]["split_at_line_ends"] == 1


def test_ids_beyond_uint16_are_int32(tmp_path: Path, tokenizer_text: str, corpus: Path, preprocess: Any, texts: list[str]) -> None:
    content = json.loads(tokenizer_text)
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 70_000, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    code, _, err = preprocess("--input", corpus, "--tokenizer", tmp_path / "tokenizer.json", "--output", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["dtype"] == "int32"
    tokenizer = Tokenizer.from_str(tokenizer_text)
    documents = read_documents(tmp_path / "out") + read_documents(tmp_path / "out", "validation")
    assert sorted(documents) == sorted([*tokenizer.encode(t).ids, 0] for t in texts)


def test_quiet_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from data import command as data_command

    now = [0.0]
    monkeypatch.setattr(data_command.time, "monotonic", lambda: now[0])
    progress = data_command.Progress(1_000_000)
    for _ in range(10):
        now[0] += 2.0
        progress.update(progress.done + 100_000, 50)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "\r" not in "".join(lines)
    assert lines[0] == "preprocess: 150 documents, 25 documents/s, 0.1 MB/s, 30 %, 14 s to go"

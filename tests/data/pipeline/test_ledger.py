"""A folder belongs to one job, with its arguments."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from data_helpers import command, contents, environment, no_file_beyond, write_rows

from data import files
from data.cli import UserError
from data.lock import take_folder
from data.pipeline import job, ledger
from data.pipeline.ledger import Ledger
from data.shards import load_manifest


def test_a_job_s_folder_keeps_its_name(tmp_path: Path, synced: list[Path]) -> None:
    """A power cut lost the shards of days with a name that was not on the disk."""
    ledger.Ledger.open(tmp_path / "shards" / "out", {}).lock.release()
    assert {tmp_path, tmp_path / "shards"} <= set(synced)


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
        (folder / "inputs.jsonl").unlink()  # as a job of an older version has none
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
    after = contents(folder)
    # The lock names who looked in last.
    assert (after.pop(".lock", None) is None) == (before.pop(".lock", None) is None) and after == before


def test_what_lists_every_shard_may_be_larger_than_other_settings(
    expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 780,335 shards on, the manifest of a job that had gone well was over the limit for small files and could not be read."""
    Ledger.open(tmp_path / "job", {"note": "x" * 200}).lock.release()
    monkeypatch.setattr(files.read_json, "__defaults__", (100,))
    with pytest.raises(OSError, match="at most 100 bytes"):
        files.read_json(expected / "manifest.json")
    assert load_manifest(expected)["format"]
    assert ledger.read_state(tmp_path / "job/state.json")["arguments"] == {"note": "x" * 200}


def test_the_difference_of_many_inputs_is_found_at_once() -> None:
    """Each file was looked for in the whole list of the others: a million would have taken months."""
    files = [[f"part-{i:06}.json", i, 1] for i in range(40_000)]
    changed = [["part-000007.json", 8, 1], *files[:7], *files[8:-1], ["more.json", 5, 1]]
    began = time.process_time()
    found = ledger.differences({"input_files": files}, {"input_files": changed})
    names = "part-000007.json (7 bytes), part-039999.json (39999 bytes), part-000007.json (8 bytes), more.json (5 bytes)"
    assert found == [f"the input changed: {names}"]
    assert time.process_time() - began < 5
    found = ledger.differences({"input_files": files[:2]}, {"input_files": files[1::-1]})
    assert found == ["the input changed: the same files in another order"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path, flags: list[object], preprocess: Any) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "precious").write_text("x")
    code, _, err = preprocess(*flags, "--output", tmp_path)
    assert code == 2 and "not empty" in err and (tmp_path / "train" / "precious").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_a_job_that_is_completed_while_another_begins_stays_complete(
    killed: bool, expected: Path, flags: list[object], tmp_path: Path, preprocess: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second had found no manifest and listed its input when the first was done, or (`killed`) had only its manifest written.

    What was left of the first's state had the second cut finished shards back.
    """
    output, real = tmp_path / "out", job.load_contamination

    def first(files: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(job, "load_contamination", real)
            patch.setattr(job, "STATE_INTERVAL_S", 0.0)
            if killed:
                patch.setattr(ledger, "clear_leftovers", lambda folder: None)
            assert preprocess(*flags, "--output", output)[0] == 0
        assert (output / "state.json").exists() == killed
        return real(files)

    monkeypatch.setattr(job, "load_contamination", first)
    code, _, err = preprocess(*flags, "--output", output)
    assert code == 2 and "another job has completed" in err and err.count("\n") == 1, err
    monkeypatch.setattr(job, "load_contamination", real)
    assert preprocess(*flags, "--output", output)[0] == 0
    assert contents(output) == contents(expected)


def test_nobody_begins_in_a_folder_that_is_being_cleared(
    flags: list[object], tmp_path: Path, preprocess: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last document, or an error, the lock was given back first."""
    tried = []
    for name in ("clear_leftovers", "clear"):
        real = getattr(ledger, name)

        def clear(folder: Path, real: Any = real) -> None:
            with pytest.raises(UserError, match="in use by another job"):
                take_folder(folder, "job")
            tried.append(folder.name)
            real(folder)

        monkeypatch.setattr(ledger, name, clear)
    assert preprocess(*flags, "--output", tmp_path / "whole")[0] == 0
    write_rows(tmp_path / "broken.jsonl", [{"x": 1}])
    assert preprocess("--input", tmp_path / "broken.jsonl", *flags[2:4], "--output", tmp_path / "failed")[0] == 2
    assert tried == ["whole", "failed"]


def test_nobody_begins_while_the_last_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock went before the state, which a job that began in between read, and then lost. And without its state what else a
    killed job left would be a stranger's."""
    for name in (ledger.STATE, ledger.KEY_JOURNAL):
        (tmp_path / name).touch()
    held, real, seen = take_folder(tmp_path, "job"), Path.unlink, []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name in (ledger.STATE, ".lock"):
            seen.append(sorted(other.name for other in tmp_path.iterdir()))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    ledger.clear(tmp_path)
    held.release()
    assert seen == [[".lock", ledger.STATE], [".lock"]] and not list(tmp_path.iterdir())


def test_what_was_rejected_is_on_the_disk_before_the_manifest(
    tmp_path: Path, tokenizer_file: Path, preprocess: Any, synced: list[Path]
) -> None:
    """Its job is complete then: nothing would write the last rows again after a power cut."""
    path = write_rows(tmp_path / "x.jsonl", [{"content": 5}, {"content": "a = 1\n"}])
    flags = ["--input", path, "--tokenizer", tokenizer_file, "--validation_fraction", 0]
    assert preprocess(*flags, "--output", tmp_path / "out")[0] == 0
    names = [path.name for path in synced]
    assert names.index("rejected.jsonl") < names.index(".manifest.json.tmp")


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


def failed(folder: Path, error: type[BaseException], **position: int) -> None:
    """A job that has removed one document, saved its state if it has a position, and ended in an error."""
    with pytest.raises(error), Ledger.open(folder, {"a": 1}) as begun:
        begun.append(ledger.REMOVED, b"x" * 10)
        if position:
            begun.save(position=position)
        raise error


def test_what_is_durable_outlives_an_error_and_all_outlives_an_interrupt(tmp_path: Path) -> None:
    failed(tmp_path, RuntimeError)
    assert [p.name for p in tmp_path.iterdir()] == ["rejected.jsonl"]
    failed(tmp_path, KeyboardInterrupt)
    assert (tmp_path / "state.json").exists()
    failed(tmp_path, RuntimeError, offset=1)
    assert (tmp_path / "state.json").exists() and (tmp_path / "removed.jsonl").read_bytes() == b"x" * 10


def test_a_journal_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    failed(tmp_path, RuntimeError, offset=1)
    (tmp_path / "removed.jsonl").write_bytes(b"x" * 9)
    with pytest.raises(UserError, match=r"removed\.jsonl is shorter than the job's state says"):
        Ledger.open(tmp_path, {"a": 1})


def test_a_full_disk_is_named_at_the_write(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large") as raised, Ledger.open(tmp_path, {"a": 1}) as begun, no_file_beyond(1000):
        begun.append(ledger.REMOVED, bytes(100_000))
    assert raised.value.filename == str(tmp_path / "removed.jsonl")

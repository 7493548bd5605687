"""A job goes on with the input it was begun with, or refuses with the names of the files that changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import contents, json_lines, read_documents, write_rows

from data.cli import UserError
from data.pipeline import inputs, job
from data.sources import blocks

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """60 source files, as in the stranger's report."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for i in range(60):
        (folder / f"m{i:04d}.py").write_text(f"# {i}\n" + f"x{i} = {i}\n" * 40)
    return folder


def stop_in_the_middle(monkeypatch: pytest.MonkeyPatch, preprocess: Command, *flags: object) -> None:
    """The job dies after some twenty blocks, each of them saved."""

    class Killed(BaseException):
        pass

    real, left = job.Job.consume, [20]

    def consume(self: Any, result: Any) -> bool:
        left[0] -= 1
        if not left[0]:
            raise Killed
        return real(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", 300)
        patch.setattr(job, "STATE_INTERVAL_S", 0.0)
        patch.setattr(job.Job, "consume", consume)
        with pytest.raises(Killed):
            preprocess(*flags)


def rename(tree: Path) -> None:
    (tree / "m0000.py").rename(tree / "z0000.py")


def rewrite_all(tree: Path) -> None:
    for path in tree.iterdir():
        path.write_text(path.read_text().replace("x", "y"))


def rewrite_behind_its_time(tree: Path) -> None:
    path = tree / "m0050.py"
    before = path.stat()
    path.write_text(path.read_text().replace("x", "y"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: list[tuple[Callable[[Path], object], list[str]]] = [
    (rename, ["m0000.py is gone", "z0000.py is new"]),
    (rewrite_all, ["m0000.py was written to", "and 56 more"]),
    (rewrite_behind_its_time, ["m0050.py was written to"]),
    (lambda tree: (tree / "m0040.py").unlink(), ["m0040.py is gone"]),
    (lambda tree: (tree / "a.py").write_text("x"), ["a.py is new"]),
    (lambda tree: os.truncate(tree / "m0007.py", 5), ["m0007.py has 5 bytes instead of"]),
]


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=range(len(CHANGES)))
@pytest.mark.parametrize("state", ["killed", "complete"])
def test_a_changed_tree_is_refused_with_the_file_s_name(
    change: Callable,
    named: list[str],
    state: str,
    tree: Path,
    tmp_path: Path,
    preprocess: Command,
    tokenizer_file: Path,
    monkeypatch: Any,
) -> None:
    flags = ["--input", f"tree:{tree}", "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--validation_fraction", 0]
    if state == "killed":
        stop_in_the_middle(monkeypatch, preprocess, *flags)
        assert 0 < json.loads((tmp_path / "out" / "state.json").read_text())["position"]["offset"] < 60
    else:
        assert preprocess(*flags)[0] == 0
    before = contents(tmp_path / "out")
    kept = Path(shutil.copytree(tree, tmp_path / "kept"))
    change(tree)
    code, _, err = preprocess(*flags)
    assert code == 2 and "the input changed" in err and err.count("\n") == 1, err
    assert all(name in err for name in named), err
    after = contents(tmp_path / "out")
    assert {k: v for k, v in after.items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}
    # Put back, with other times: the job goes on, and nothing is lost.
    shutil.rmtree(tree)
    shutil.copytree(kept, tree, copy_function=shutil.copyfile)
    code, _, err = preprocess(*flags)
    assert code == 0, err
    assert len(read_documents(tmp_path / "out")) == 60


@pytest.mark.parametrize("state", ["killed", "complete"])
def test_another_flag_is_no_changed_input(
    state: str, tree: Path, tmp_path: Path, preprocess: Command, tokenizer_file: Path, monkeypatch: Any
) -> None:
    """A narrower --input was answered with the files that it left out: gone, and to be put back."""
    flags = ["--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--input"]
    if state == "killed":
        stop_in_the_middle(monkeypatch, preprocess, *flags, tree)
    else:
        assert preprocess(*flags, tree)[0] == 0
    narrower = tree / "m0000.py"
    code, _, err = preprocess(*flags, narrower)
    assert code == 2 and err.count("\n") == 1, err
    assert f"was begun with other arguments (--input was ['{tree}'], now ['{narrower}']); use those" in err
    benchmark = tmp_path / "benchmark.jsonl"
    benchmark.write_text('{"prompt": "def a(): pass", "test": "assert a() is None"}\n')
    code, _, err = preprocess(*flags, tree, "--decontaminate", benchmark)
    assert code == 2 and "--decontaminate was [], now [['" in err, err
    (tree / "m0001.py").unlink()
    code, _, err = preprocess(*flags, tree, "--seed", 5)
    assert code == 2 and "(--seed was 0, now 5); use those" in err, err
    code, _, err = preprocess(*flags, tree)
    assert code == 2 and "m0001.py is gone; put it back" in err, err


@pytest.mark.parametrize("kind", ["gz", "parquet", "tar", "benchmark"])
def test_files_of_every_kind_are_held(kind: str, tmp_path: Path, corpus: Path, preprocess: Command, tokenizer_file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"x{i} = {i}\n" for i in range(9)]
    path = tmp_path / f"x.json.{kind}"
    extra: list[object] = []
    if kind == "gz":
        write_rows(path, [{"content": t} for t in texts])
    elif kind == "parquet":
        pq.write_table(pa.table({"content": texts}), path)
    elif kind == "tar":
        (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "a.jsonl", "a.jsonl")
    else:
        write_rows(path, [{"prompt": "one two three four five six seven eight nine ten"}])
        extra = ["--decontaminate", path]
    source = corpus if kind == "benchmark" else path
    flags = ["--input", source, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", *extra]
    assert preprocess(*flags)[0] == 0
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, _, err = preprocess(*flags)
    assert code == 2 and f"{path} was written to" in err


@pytest.mark.parametrize("change", ["text", "end"])
@pytest.mark.parametrize("state", ["killed", "complete"])
def test_another_tokenizer_of_the_same_name_is_refused(
    state: str, change: str, tree: Path, tmp_path: Path, preprocess: Command, tokenizer_file: Path, monkeypatch: Any
) -> None:
    """Trained anew under the same name, it was said to be complete, with the shards of the old one."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    path = Path(shutil.copy(tokenizer_file, folder / "tokenizer.json"))
    flags = ["--input", f"tree:{tree}", "--tokenizer", folder, "--output", tmp_path / "out"]
    if state == "killed":
        stop_in_the_middle(monkeypatch, preprocess, *flags)
    else:
        assert preprocess(*flags)[0] == 0
    before = path.read_text()
    if change == "text":
        path.write_text(before.replace("<fim_pad>", "<padding>"))
    else:
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<fim_pad>"}')
    code, _, err = preprocess(*flags)
    assert code == 2 and f"--tokenizer {folder} was written to since" in err and err.count("\n") == 1, err
    path.write_text(json.dumps(json.loads(before), indent=4))  # saved anew: the same ids
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    assert preprocess(*flags)[0] == 0
    path.write_text("{}")
    code, _, err = preprocess(*flags)
    assert code == 2 and "is not a tokenizer.json" in err and err.count("\n") == 1, err
    shutil.rmtree(folder)  # its copy is enough
    assert preprocess(*flags)[0] == 0


def test_the_middle_of_a_large_file_is_held_by_its_time(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(3 * inputs.END_BYTES))
    first = inputs.InputFile.of(str(path))
    with open(path, "r+b") as file:
        file.seek(3 * inputs.END_BYTES // 2)
        file.write(b"x")
    os.utime(path, ns=(1, first.modified_ns + 1))
    assert first.change(inputs.InputFile.of(str(path))) == "has another time of modification"  # more is not known
    small = tmp_path / "y"
    small.write_bytes(b"x")
    then = inputs.InputFile.of(str(small))
    os.utime(small, ns=(1, 1))
    assert then.change(inputs.InputFile.of(str(small))) is None


def test_a_file_whose_ends_are_all_of_it_is_not_held_by_its_time(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for size, change in ((2 * inputs.END_BYTES, None), (2 * inputs.END_BYTES + 1, "has another time of modification")):
        path.write_bytes(bytes(size))
        before = inputs.InputFile.of(str(path))
        os.utime(path, ns=(1, 1))
        assert before.change(inputs.InputFile.of(str(path))) == change


def test_files_in_another_order_are_another_input(tmp_path: Path) -> None:
    """They would be other documents at the same place."""
    files = [inputs.InputFile(name, 1, 1, "0") for name in "ab"]
    inputs.write_inputs(tmp_path, files)
    inputs.check_inputs(tmp_path, files)
    with pytest.raises(UserError, match="its files are in another order"):
        inputs.check_inputs(tmp_path, files[::-1])


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # which would wait for a writer
    for name in ("fifo", "nowhere", "."):
        assert inputs.InputFile.of(str(tmp_path / name)) == (str(tmp_path / name), -1, 0, "")


def test_the_ends_are_both_hashed(tmp_path: Path) -> None:
    path, size = tmp_path / "x", 5 * inputs.END_BYTES
    found = set()
    for at in (None, 0, inputs.END_BYTES - 1, size - inputs.END_BYTES, size - 1):
        data = bytearray(size)
        if at is not None:
            data[at] = 1
        path.write_bytes(data)
        found.add(inputs.InputFile.of(str(path)).ends)
    assert len(found) == 5


def test_a_file_that_grows_while_it_is_read_is_refused(
    tree: Path, tmp_path: Path, preprocess: Command, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = job.Job.consume

    def consume(self: Any, result: Any) -> bool:
        with open(tree / "m0000.py", "a") as file:
            file.write("more\n")
        return real(self, result)

    monkeypatch.setattr(job.Job, "consume", consume)
    flags = ["--input", f"tree:{tree}", "--tokenizer", tokenizer_file, "--output", tmp_path / "out"]
    code, _, err = preprocess(*flags)
    assert code == 2 and "m0000.py has" in err and "it changed while it was read" in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("lasting", [False, True])
def test_an_outage_ends_the_job_and_nothing_is_left_out(
    lasting: bool, tree: Path, tmp_path: Path, preprocess: Command, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a disk that was gone for a minute was a rejection, and the folder complete without them."""
    flags = ["--input", f"tree:{tree}", "--tokenizer", tokenizer_file]
    assert preprocess(*flags, "--output", tmp_path / "whole")[0] == 0
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1200)  # a few files
    down = True

    def guarded(path: Any, *args: Any) -> Any:
        if down and ("m0030" in str(path) or "m0031" in str(path)):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open(path, *args)

    monkeypatch.setattr("data.sources.trees.open", guarded, raising=False)
    code, _, err = preprocess(*flags, "--output", tmp_path / "out")
    assert code != 0 and "m0030.py cannot be read (Input/output error), nor can 1 more, and could be when the job began" in err
    assert err.count("\n") == 1 and not (tmp_path / "out" / "manifest.json").exists()
    assert json.loads((tmp_path / "out" / "state.json").read_text())["position"]["offset"] > 20
    down = lasting
    code, _, err = preprocess(*flags, "--output", tmp_path / "out")
    assert code == 0, err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    if lasting:
        assert manifest["documents"]["read"] == 58 and manifest["documents"]["rejected"] == {"cannot be read": 2}
    else:
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_that_is_gone_is_asked_for_and_never_left_out(
    tree: Path, tmp_path: Path, preprocess: Command, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command was to go on without it, and was refused at every start."""
    flags = ["--input", f"tree:{tree}", "--tokenizer", tokenizer_file]
    assert preprocess(*flags, "--output", tmp_path / "whole")[0] == 0
    path, kept = tree / "m0030.py", tmp_path / "kept.py"
    shutil.copy2(path, kept)
    real = job.write_inputs
    monkeypatch.setattr(job, "write_inputs", lambda *args: (real(*args), path.unlink()))
    for _ in range(2):  # two outages
        code, _, err = preprocess(*flags, "--output", tmp_path / "out")
        assert code == 2 and f"{path} cannot be read (No such file or directory) and could be when the job began" in err
        assert "when that is mended the same command goes on" in err and err.count("\n") == 1
        code, _, err = preprocess(*flags, "--output", tmp_path / "out")
        assert code == 2 and f"{path} is gone; put it back" in err
        assert json.loads((tmp_path / "out" / "state.json").read_bytes())["unreadable"] == [], "it has not broken off yet"
        shutil.copy2(kept, path)
    monkeypatch.setattr(job, "write_inputs", real)
    assert preprocess(*flags, "--output", tmp_path / "out")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_no_file_is_listed_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
    assert inputs.InputFile.of(str(tmp_path / "fifo")) == inputs.InputFile(str(tmp_path / "fifo"), -1, 0, "")
    assert inputs.InputFile.of("/dev/zero").bytes == -1 and inputs.InputFile.of(str(tmp_path / "none")).bytes == -1


def test_the_record_of_what_was_read_stays(expected: Path, corpus: Path) -> None:
    rows = [json.loads(line) for line in (expected / "inputs.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [str(corpus / f"file-{i}.json.gz") for i in range(3)]
    assert [row["bytes"] for row in rows] == [(corpus / f"file-{i}.json.gz").stat().st_size for i in range(3)]

"""Inputs become the same ordered list of sources every time, and what cannot be one is named."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from data.cli import NotFound
from data.sources.discover import describe_endings, find_sources


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def test_folder_of_data_files_is_read_in_order_of_names(tmp_path: Path) -> None:
    touch(tmp_path, "b.jsonl", "a.json.gz", "sub/c.parquet", "d.json", "e.jsonl.zst", "notes.txt", "README.md")
    names = [os.path.relpath(s.name, tmp_path) for s in find_sources([str(tmp_path)])]
    assert names == ["a.json.gz", "b.jsonl", "d.json", "e.jsonl.zst", "sub/c.parquet"]


def test_folder_of_source_files_is_a_tree_without_caches_and_packages(tmp_path: Path) -> None:
    touch(tmp_path, "b.py", "a/x.py", "package.json", "__pycache__/c.py", ".git/d.py", "node_modules/e.py", "site-packages/f.py")
    (source,) = find_sources([str(tmp_path)])
    assert source.kind == "tree" and source.files == ("a/x.py", "b.py")


def test_a_folder_of_both_must_be_told_apart(tmp_path: Path) -> None:
    touch(tmp_path, "a.py", "b.jsonl")
    with pytest.raises(ValueError, match=r"tree:.*a glob"):
        find_sources([str(tmp_path)])
    assert find_sources([f"tree:{tmp_path}"])[0].files == ("a.py",)
    assert [s.kind for s in find_sources([f"{tmp_path}/*.jsonl"])] == ["file"]


def test_each_file_comes_once_whatever_the_globs(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "b.jsonl")
    sources = find_sources([f"{tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl", str(tmp_path)])
    assert [Path(s.name).name for s in sources] == ["b.jsonl", "a.jsonl"]


def test_the_output_folder_is_never_read(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "out/rejected.jsonl")
    assert len(find_sources([str(tmp_path)], exclude=tmp_path / "out")) == 1


def test_the_output_folder_below_a_relative_input_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.py", "out/b.py")
    monkeypatch.chdir(tmp_path)
    assert find_sources(["tree:."], exclude=Path("out"))[0].files == ("a.py",)


@pytest.mark.parametrize("pattern", ["*", "**/*.jsonl", "sub/../*"])
def test_a_glob_over_the_output_folder_does_not_read_it(pattern: str, tmp_path: Path) -> None:
    """A killed job could not go on, nor a finished one be found finished: its own lists were new input."""
    touch(tmp_path, "a.jsonl", "sub/b.jsonl")
    before = find_sources([f"{tmp_path}/{pattern}"], exclude=tmp_path / "out")
    touch(tmp_path, "out/rejected.jsonl", "out/tokenizer/tokenizer.json", "out.jsonl")
    after = find_sources([f"{tmp_path}/{pattern}"], exclude=tmp_path / "out")
    names = [os.path.relpath(source.name, tmp_path) for source in after]
    assert [name for name in names if name != "out.jsonl"] == [
        os.path.relpath(s.name, tmp_path) for s in before
    ] and "out.jsonl" in names
    assert len(find_sources([f"{tmp_path}/{pattern}"])) == len(after) + (2 if pattern != "**/*.jsonl" else 1)


def test_an_output_folder_that_holds_all_that_a_glob_matches_is_named(tmp_path: Path) -> None:
    """`--input 'corpus/*.jsonl' --output corpus` was told that nothing matches."""
    touch(tmp_path, "a.jsonl")
    with pytest.raises(NotFound, match=rf"no input matches .* outside of --output {re.escape(str(tmp_path.resolve()))}"):
        find_sources([f"{tmp_path}/*.jsonl"], exclude=tmp_path)
    with pytest.raises(NotFound, match=r"no input matches .*\.zip$"):
        find_sources([f"{tmp_path}/*.zip"], exclude=tmp_path)


def test_links_in_a_loop_end(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.py")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert find_sources([str(tmp_path)])[0].files == ("a/x.py",)


def test_links_to_folders_elsewhere_are_followed_once(tmp_path: Path) -> None:
    """A corpus that is put together of links: they were passed over without a word."""
    touch(tmp_path, "disk/a/x.py", "disk/a/deep/y.py", "disk/b/z.py", "corpus/own/w.py", "corpus/w.py")
    corpus = tmp_path / "corpus"
    for name, target in (("more", "disk/a"), ("deep", "disk/a/deep"), ("b", "disk/b"), ("inside", "corpus/own"), ("up", ".")):
        (corpus / name).symlink_to(tmp_path / target)
    (tmp_path / "disk" / "a" / "zback").symlink_to(tmp_path / "disk")
    (found,) = find_sources([str(corpus)])
    assert found.files == ("b/z.py", "deep/y.py", "more/x.py", "own/w.py", "w.py")
    assert found.size == sum((corpus / name).stat().st_size for name in found.files)


@pytest.mark.parametrize("inputs", [["src/**"], ["src", "src/pkg"], ["tree:src", "tree:src/pkg", "src/pkg/*.py"], ["src/*", "src"]])
def test_a_file_of_two_trees_is_read_once(inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "src/a.py", "src/pkg/b.py", "src/pkg/sub/c.py")
    monkeypatch.chdir(tmp_path)
    sources = find_sources(inputs)
    found = [os.path.realpath(os.path.join(source.name, name)) for source in sources for name in source.files]
    assert sorted(found) == sorted(map(str, tmp_path.resolve().rglob("*.py")))
    assert sum(source.size for source in sources) == sum(os.path.getsize(path) for path in found)


def test_a_link_to_a_file_of_the_tree_is_no_second_document(tmp_path: Path) -> None:
    touch(tmp_path, "src/a.py", "src/pkg/b.py", "other/c.py")
    for link, target in (("src/again.py", "src/a.py"), ("src/first.py", "other/c.py"), ("src/pkg/0.py", "src/pkg/b.py")):
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "src" / "gone.py").symlink_to(tmp_path / "nowhere")
    (found,) = find_sources([str(tmp_path / "src"), str(tmp_path / "other"), str(tmp_path / "src" / "again.py")])
    assert found.files == ("a.py", "first.py", "gone.py", "pkg/0.py")
    assert found.size == 3 * (tmp_path / "src" / "a.py").stat().st_size


def locked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As for somebody who may not look into it; root, as whom tests may run, always may."""
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path) == str(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("kind", ["tree", "data"])
def test_a_folder_that_cannot_be_looked_into_is_counted(
    kind: str, tmp_path: Path, preprocess: Any, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All below it was missing without a word, and the job was called complete."""
    root, line = tmp_path / "in", '{"content": "x = 1"}\n'
    touch(root, "secret/b.py", "other.txt")
    (root / ("a.py" if kind == "tree" else "a.jsonl")).write_text(line)
    locked(monkeypatch, root / "secret")
    flags = ["--tokenizer", tokenizer_file, "--validation_fraction", 0]
    code, out, err = preprocess("--input", root, "--output", tmp_path / "out", *flags)
    assert code == 0 and f"{root}/secret" in err and "folder that cannot be looked into" in err and "(1 .txt) left out" in out
    documents = json.loads((tmp_path / "out" / "manifest.json").read_text())["documents"]
    assert documents["rejected"] == {"folder that cannot be looked into": 1}
    assert preprocess("--input", root, "--output", tmp_path / "out", *flags)[0] == 0
    code, _, err = preprocess("--input", root, "--output", tmp_path / "strict", "--on_error", "fail", *flags)
    assert code == 2 and "secret" in err
    locked(monkeypatch, root)
    code, _, err = preprocess("--input", root, "--output", tmp_path / "none", *flags)
    assert code == 2 and "Permission denied" in err and err.count("\n") == 1


def test_stdlib_has_no_packages_tests_or_idle() -> None:
    (source,) = find_sources(["stdlib"])
    parts = {part for name in source.files for part in Path(name).parts}
    assert "argparse.py" in source.files and len(source.files) > 300
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@pytest.mark.parametrize("name", ["nowhere", "nowhere/*.jsonl", "tree:nowhere"])
def test_what_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_sources([name.replace("nowhere", f"{tmp_path}/nowhere")])


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no files to read"):
        find_sources([str(tmp_path)])


def test_a_tree_says_what_it_leaves_out_and_reads_what_it_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "a.py", "b.c", "sub/c.h", "d.cpp", "e.cpp", "Makefile", "._a.py")
    (source,) = find_sources([f"tree:{tmp_path}"])
    assert source.files == ("a.py",) and describe_endings(source.left_out) == "5 files (2 .cpp, 1 without an ending, 1 .c, 1 .h)"
    (source,) = find_sources([f"tree:{tmp_path}"], suffixes=(".py", ".c", ".h", ".cpp"))
    assert source.files == ("a.py", "b.c", "d.cpp", "e.cpp", "sub/c.h") and source.left_out == ("Makefile",)
    (source,) = find_sources([f"tree:{tmp_path}"], suffixes=("",))
    assert len(source.files) == 6 and source.left_out == ()


def test_a_tree_without_python_says_what_it_has(tmp_path: Path) -> None:
    touch(tmp_path, "a.rs", "b.rs")
    with pytest.raises(FileNotFoundError, match=r"no \.py files in .*; it holds 2 files \(2 \.rs\): name .* --suffixes"):
        find_sources([f"tree:{tmp_path}"])
    with pytest.raises(FileNotFoundError, match=r"no files to read in .*; it holds 2 files \(2 \.rs\)"):
        find_sources([str(tmp_path)])


def test_a_folder_of_data_says_what_it_leaves_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "b.jsonl.xz", "c.json.bz2", "old.tar.gz", "README.md")
    first, *rest = find_sources([str(tmp_path)])
    assert [Path(s.name).name for s in (first, *rest)] == ["a.jsonl", "b.jsonl.xz", "c.json.bz2"]
    assert first.left_out == ("README.md", "old.tar.gz") and all(s.left_out == () for s in rest)


def test_a_data_file_named_with_all_endings_stays_data(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "b.c")
    assert [s.kind for s in find_sources([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.c"], suffixes=("", ".c"))] == ["file", "tree"]
    with pytest.raises(ValueError, match=r"source files \(b\.c\) and data files \(a\.jsonl\)"):
        find_sources([str(tmp_path)], suffixes=("",))
    (tmp_path / "b.c").unlink()
    assert [s.kind for s in find_sources([str(tmp_path)], suffixes=("",))] == ["file"]


def test_a_folder_of_archives_says_how_to_name_them(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar.gz", "b.tar")
    with pytest.raises(FileNotFoundError, match=r"name archives themselves, as '.*/\*\.tar\*'"):
        find_sources([str(tmp_path)])
    assert [Path(s.name).name for s in find_sources([f"{tmp_path}/*.tar*"])] == ["a.tar.gz", "b.tar"]

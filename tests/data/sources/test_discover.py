"""Inputs become the same ordered list of sources every time, and what cannot be one is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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


def test_links_in_a_loop_end(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.py")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert find_sources([str(tmp_path)])[0].files == ("a/x.py",)


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


def test_a_folder_of_archives_says_how_to_name_them(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar.gz", "b.tar")
    with pytest.raises(FileNotFoundError, match=r"name archives themselves, as '.*/\*\.tar\*'"):
        find_sources([str(tmp_path)])
    assert [Path(s.name).name for s in find_sources([f"{tmp_path}/*.tar*"])] == ["a.tar.gz", "b.tar"]

"""tar archives: a member is read as a file of its name; those before a damage are kept; a hostile one takes no memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import blocks_of, compress, json_lines, no_file_beyond, read_file

from data.cli import sentence
from data.sources import blocks
from data.sources.archives import members as members_of
from data.sources.blocks import Block, ReadOptions, Rejection
from data.sources.discover import Source
from data.sources.documents import read_documents
from data.sources.read import read_blocks

TEXTS = [f"def f{i}(a, b):\n    return a * {i} + b\n" * 5 for i in range(60)]


def make_tar(
    members: dict[str, bytes], mode: str = "w", format: int = tarfile.PAX_FORMAT, pax: dict[str, str] | None = None
) -> bytes:
    """`pax`: of the first member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers, pax = len(data), pax or {}, None
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"content": texts}), sink, row_group_size=7)
    return sink.getvalue()


def summed(header: bytes) -> bytes:
    """A header with its checksum."""
    return header[:148] + b"%06o\0 " % (sum(header[:148] + header[156:]) + 8 * ord(" ")) + header[156:]


LONG = "folder/" * 40 + "x.jsonl"  # more than a header's 100 characters
MEMBERS = {
    "a.jsonl": json_lines(TEXTS[:10]),
    "sub/b.json.gz": gzip.compress(json_lines(TEXTS[10:20])),
    "c.parquet": parquet(TEXTS[20:30]),
    LONG: json_lines(TEXTS[30:45]),
    "d.jsonl.zst": compress(json_lines(TEXTS[45:]), "zst"),
    "README.md": b"not read",
    "._a.jsonl": b"\0\5\x16\7",
}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_read_as_files_in_their_order(mode: str, format: int, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar(MEMBERS, mode, format))
    assert read_file(tmp_path / "x.tar") == (TEXTS, [])


def test_zstd_around_and_the_oldest_format(tmp_path: Path) -> None:
    old = make_tar({"a.jsonl": json_lines(TEXTS)}, format=tarfile.USTAR_FORMAT)
    without_magic = old[:257] + bytes(8) + old[265:512]  # the seventh edition of Unix had none
    (tmp_path / "x").write_bytes(compress(summed(without_magic) + old[512:], "zst"))
    assert read_file(tmp_path / "x") == (TEXTS, [])


HALVES = {"a.jsonl": json_lines(TEXTS[:30]), "b.jsonl": json_lines(TEXTS[30:])}
SIZE = len(HALVES["a.jsonl"])


@pytest.mark.parametrize(
    ("at", "value", "options"),
    [
        pytest.param(124, b"0" * 11 + b"\0", {"pax": {"size": str(SIZE)}}, id="a size in the pax header alone, as beyond 8 GiB"),
        pytest.param(124, b"\x80" + SIZE.to_bytes(11, "big"), {}, id="a binary size"),
        pytest.param(156, b"7", {}, id="a contiguous file"),
        pytest.param(156, b"\0", {}, id="the oldest mark of a file"),
    ],
)
def test_headers_of_other_writers(at: int, value: bytes, options: dict[str, Any], tmp_path: Path) -> None:
    data = make_tar(HALVES, **options)
    start = data.index(b"a.jsonl\0")
    changed = data[start : start + at] + value + data[start + at + len(value) : start + 512]
    (tmp_path / "x.tar").write_bytes(data[:start] + summed(changed) + data[start + 512 :])
    assert read_file(tmp_path / "x.tar") == (TEXTS, [])


def test_a_checksum_of_signed_bytes_is_right(tmp_path: Path) -> None:
    data = make_tar({"é.jsonl": json_lines(TEXTS)}, format=tarfile.GNU_FORMAT)
    signed = b"%06o\0 " % (int(data[148:154], 8) - 2 * 256)  # two bytes of the name are beyond 127
    (tmp_path / "x.tar").write_bytes(data[:148] + signed + data[156:])
    assert read_file(tmp_path / "x.tar") == (TEXTS, [])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_each_member_has_its_own_name(format: int) -> None:
    names = ["folder/" * 16 + "a.jsonl", "b.jsonl", "é.jsonl", "c.jsonl"]
    data = make_tar(dict.fromkeys(names, b"{}\n"), format=format)
    assert [(m.name, m.size) for m in members_of(io.BytesIO(data))] == [(name, 3) for name in names]


def test_archives_one_behind_the_other_are_read_to_the_end(tmp_path: Path) -> None:
    """`cat a.tar b.tar`: tar(1) and tarfile stop at the first end mark and lose the second half."""
    halves = [make_tar({f"{i}.jsonl": json_lines(part)}) for i, part in enumerate((TEXTS[:30], TEXTS[30:]))]
    (tmp_path / "x.tar").write_bytes(b"".join(halves))
    assert read_file(tmp_path / "x.tar") == (TEXTS, [])


def test_source_files_in_an_archive_are_documents(tmp_path: Path) -> None:
    members = {f"p/{i}.py": text.encode() for i, text in enumerate(TEXTS)}
    other = {"package.json": b"{}", "p/bad.py": b"\xff", "p/node_modules/x.py": b"x", ".git/y.py": b"y"}
    (tmp_path / "x.tgz").write_bytes(make_tar({**members, **other}, "w:gz"))
    texts, rejections = read_file(tmp_path / "x.tgz")
    assert texts == TEXTS and [(Path(r.name).name, r.kind) for r in rejections] == [("bad.py", "not UTF-8")]


@pytest.mark.parametrize("members", [MEMBERS, {f"{i}.py": t.encode() for i, t in enumerate(TEXTS)}], ids=["data", "code"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_can_be_taken_up_at_any_block(
    members: dict[str, bytes], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 700)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 300)
    (tmp_path / "x.tar").write_bytes(make_tar(members, mode))

    def documents(found: list[Block]) -> list[tuple[str, int | None]]:
        return [(d.name, d.line) for block in found for d in read_documents(block, "content")]

    whole = blocks_of(tmp_path / "x.tar")
    assert len(documents(whole)) == 60 and len(whole) > 15
    for i, block in enumerate(whole[:-1]):
        assert documents(blocks_of(tmp_path / "x.tar", block.after)) == documents(whole[i + 1 :])


@pytest.mark.parametrize("kind", ["data", "code"])
def test_an_archive_says_what_it_leaves_out(kind: str, tmp_path: Path, preprocess: Any) -> None:
    """Of `bundle.tar` with one small data file and thousands of rows in `part1.tar.gz` nobody was told, as of a folder."""
    read = {"a.jsonl": json_lines(TEXTS)} if kind == "data" else {f"{i}.py": text.encode() for i, text in enumerate(TEXTS)}
    others = dict.fromkeys(("part1.tar.gz", "part2.tar.gz", "rest.zip", "x.c", "odd.\nerror: x"), b"x")
    (tmp_path / "x.tar").write_bytes(make_tar({**others, **read}))
    code, out, err = preprocess("--input", tmp_path / "x.tar", "--train_tokenizer", 300, "--output", tmp_path / "out")
    said = f"note: {tmp_path}/x.tar: 5 files (2 .gz, 1 .zip, 1 .c, 1 .\\nerror: x) left out"
    hint = "; --suffixes names the endings of source files" if kind == "code" else ""
    assert code == 0 and out.count(said) == 1 and f"{said}{hint}\n" in out, err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["documents"]["rejected"] == {}


def test_with_all_endings_data_in_an_archive_stays_data(tmp_path: Path) -> None:
    """It was refused for "source files and data files (a.jsonl and a.jsonl)"."""
    (tmp_path / "x.tar").write_bytes(make_tar(HALVES))
    assert read_file(tmp_path / "x.tar", suffixes=("",)) == (TEXTS, [])
    (tmp_path / "x.tar").write_bytes(make_tar({"a.jsonl": b"{}", "b.c": b"int x;"}))
    assert [r.detail[:19] for r in read_file(tmp_path / "x.tar", suffixes=("",))[1]] == ["b.c and a.jsonl: un"]


def rejected(path: Path, data: bytes) -> tuple[int, list[Rejection]]:
    path.write_bytes(data)
    texts, rejections = read_file(path)
    assert texts == TEXTS[: len(texts)]
    return len(texts), rejections


def test_what_cannot_be_read_of_an_archive_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    inside = make_tar({"a.jsonl": json_lines(TEXTS[:5]), "in.json": make_tar({"x.jsonl": b"{}"}), "z.jsonl": json_lines(TEXTS[5:])})
    found, rejections = rejected(tmp_path / "x.tar", inside)
    assert found == 60 and [(Path(r.name).name, r.kind) for r in rejections] == [
        ("in.json", "archive inside an archive, which is not read")
    ]
    both = make_tar({"a.jsonl": b"{}", "b.py": b"x = 1"})
    assert [r.kind for r in rejected(tmp_path / "y.tar", both)[1]] == ["tar archive of source files and data files"]
    neither = make_tar({"a.txt": b"x"})
    assert [r.kind for r in rejected(tmp_path / "z.tar", neither)[1]] == ["tar archive without a file to read"]


@pytest.mark.parametrize("where", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("kind", ["data", "code"])
def test_of_a_cut_archive_whole_members_are_kept(where: float, mode: str, kind: str, tmp_path: Path) -> None:
    members = {f"{i}.jsonl": json_lines([t]) for i, t in enumerate(TEXTS)}
    if kind == "code":
        members = {f"{i}.py": t.encode() for i, t in enumerate(TEXTS)}
    data = make_tar(members, mode)
    found, rejections = rejected(tmp_path / "x.tar", data[: int(where * len(data))])
    assert len(rejections) == 1 and "damaged" in rejections[0].kind
    # Nothing of a gzip member without its checksum can be trusted.
    assert (found == 0) if mode == "w:gz" else (10 < found < 60)


def test_of_a_member_that_breaks_off_the_whole_lines_are_kept_from_any_block_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that went on kept other documents than one that was never stopped."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1500)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 700)
    data = make_tar({"a.jsonl": json_lines(TEXTS[:2]), "b.jsonl": json_lines(TEXTS[2:])}, format=tarfile.USTAR_FORMAT)
    last = data.index(b"def f51(")
    (tmp_path / "x.tar").write_bytes(data[:last])
    whole = blocks_of(tmp_path / "x.tar")
    lines = [line for block in whole for line in block.lines.splitlines()]
    assert lines == json_lines(TEXTS[:51]).splitlines() and len(whole) > 5
    for number, block in enumerate(whole):
        rest = blocks_of(tmp_path / "x.tar", block.after)
        assert [line for b in rest for line in b.lines.splitlines()] == [
            line for b in whole[number + 1 :] for line in b.lines.splitlines()
        ]
        if block is not whole[-1]:
            assert [r.reason for b in rest for r in b.rejections] == [
                "damaged tar archive (it ends inside b.jsonl behind line 49; what is before that is kept)"
            ]


@pytest.mark.parametrize("size", [0, 20])
def test_a_member_that_breaks_off_in_its_first_line_is_no_empty_file(size: int, tmp_path: Path) -> None:
    data = make_tar({"a.jsonl": json_lines(TEXTS[:2])}, format=tarfile.USTAR_FORMAT)
    found, rejections = rejected(tmp_path / "x.tar", data[: 512 + size])
    assert found == 0 and [r.detail for r in rejections] == ["it ends inside a.jsonl; what is before that is kept"]


@pytest.mark.parametrize("ending", ["jsonl", "py"])
def test_of_an_archive_in_two_gzip_members_the_sound_one_is_read(ending: str, tmp_path: Path) -> None:
    files = {f"{i}.{ending}": t.encode() if ending == "py" else json_lines([t]) for i, t in enumerate(TEXTS)}
    data = make_tar(files)
    cut = data.index(b"30." + ending.encode())
    second = gzip.compress(data[cut:])
    found, rejections = rejected(tmp_path / "x.tgz", gzip.compress(data[:cut]) + second[:-8] + bytes(4) + second[-4:])
    assert found == 30 and [r.kind for r in rejections] == ["damaged gzip data"]


def test_a_source_file_that_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 1000)
    (tmp_path / "x.tar").write_bytes(make_tar({"a.py": b"a = 1\n" * 300, "b.py": TEXTS[0].encode()}))
    texts, rejections = read_file(tmp_path / "x.tar")
    assert texts == TEXTS[:1] and [r.kind for r in rejections] == ["file larger than 1000 bytes in a tar archive"]


def test_a_damaged_header_ends_it_with_a_reason(tmp_path: Path) -> None:
    data = bytearray(make_tar({f"{i}.jsonl": json_lines([t]) for i, t in enumerate(TEXTS)}))
    at = data.rindex(b"50.jsonl")
    data[at + 3] ^= 1
    found, rejections = rejected(tmp_path / "x.tar", bytes(data))
    assert found == 50 and [r.kind for r in rejections] == ["damaged tar archive"] and "checksum" in rejections[0].detail


def without_end(members: dict[str, bytes]) -> bytes:
    data = make_tar(members)
    while not data[-512:].strip(b"\0"):
        data = data[:-512]
    return data


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157], block[257:265] = name, size, kind, b"ustar\x0000"
    return summed(bytes(block))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a pax header of 8 GB", header(b"x", b"77777777777\0", b"x")),
        ("a long name of 2^90 bytes", header(b"x", b"\x80" + b"\xff" * 11, b"L")),
        ("a member of 2^90 bytes", header(b"x.jsonl", b"\x80" + b"\xff" * 11, b"0")),
        ("a size that is no number", header(b"x.jsonl", b"zzz", b"0")),
        ("a pax record without end", header(b"x", b"%011o\0" % 10, b"x") + b"99 path=xx".ljust(512, b"\0")),
        ("a pax record of length 0", header(b"x", b"%011o\0" % 10, b"x") + b"0 path=xxx".ljust(512, b"\0")),
    ],
)
def test_a_hostile_header_takes_no_memory(name: str, data: bytes, tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(without_end({"a.jsonl": json_lines(TEXTS)}) + data + bytes(64 << 20)))
    texts, rejections = read_file(tmp_path / "x.tar.gz")
    assert len(rejections) <= 1 and texts in ([], TEXTS), name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, name


def test_members_whose_names_lead_out_write_nothing(tmp_path: Path) -> None:
    names = ["/etc/a.jsonl", "../../b.jsonl", "x/../../c.jsonl"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(make_tar({name: json_lines([t]) for name, t in zip(names, TEXTS, strict=False)}))
    assert read_file(tmp_path / "in" / "x.tar") == (TEXTS[:3], [])
    assert os.listdir(tmp_path) == ["in"] and os.listdir(tmp_path / "in") == ["x.tar"]


@pytest.mark.parametrize(("version", "holes"), [("gnu", 2), ("gnu", 9), ("gnu", 40), ("0.0", 3), ("0.1", 3), ("1.0", 3)])
def test_what_stands_behind_a_sparse_file_is_read(version: str, holes: int, tmp_path: Path) -> None:
    """GNU tar puts blocks of their own between its header and its content: the next header's checksum was wrong.

    The versions are those of its pax headers, where the content may begin with a list of holes, and a name hide the file's own.
    """
    with open(tmp_path / "a.py", "wb") as file:
        for number in range(holes):
            file.seek(number * 200_000)
            file.write(b"#" * 4096)
        file.truncate(holes * 200_000)
    (tmp_path / "b.py").write_text("b = 1\n")
    format = ["--format=gnu"] if version == "gnu" else ["--format=posix", f"--sparse-version={version}"]
    command = ["tar", *format, "--sparse", "--hole-detection=raw", "-cf", "x.tar", "a.py", "b.py"]
    subprocess.run(command, cwd=tmp_path, check=True)
    header = (tmp_path / "x.tar").read_bytes()[:512]
    assert version != "gnu" or (header[156:157] == b"S" and (header[482] != 0) == (holes > 4))
    texts, rejections = read_file(tmp_path / "x.tar")
    assert texts == ["b = 1\n"]
    named = f"{tmp_path}/x.tar/a.py"
    assert [(r.name, r.kind) for r in rejections] == [(named, "sparse file in a tar archive, which is not read")]


def test_links_and_devices_are_no_documents(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.jsonl")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(data := json_lines(TEXTS))
        archive.addfile(info, io.BytesIO(data))
    (tmp_path / "x.tar").write_bytes(file.getvalue())
    assert read_file(tmp_path / "x.tar") == (TEXTS, [])


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
)
def test_the_size_of_what_has_no_content_hides_no_member(kind: bytes, tmp_path: Path) -> None:
    """Old writers give a hard link its file's size, and folders one as a hint: the member after it was skipped without a word."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, text in enumerate(TEXTS):
            info = tarfile.TarInfo(f"{number}.py")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
            link = tarfile.TarInfo(f"{number}.link")
            link.type, link.linkname, link.size = kind, info.name, len(text)
            archive.addfile(link)
    (tmp_path / "x.tar").write_bytes(file.getvalue())
    assert read_file(tmp_path / "x.tar") == (TEXTS, [])


def test_any_bytes_behind_a_header_end_in_documents_or_reasons(tmp_path: Path) -> None:
    rng, kinds = random.Random(0), set()
    data = make_tar(MEMBERS)
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path / "x.tar").write_bytes(broken)
        texts, rejections = read_file(tmp_path / "x.tar")
        kinds |= {r.kind for r in rejections}
        assert texts or rejections
    assert len(kinds) > 3, kinds


def test_the_public_report(tmp_path: Path, preprocess, tokenizer_file: Path) -> None:
    """biolink/kgx#347: `plain.tar.gz` was read as text, and its first document was lost as broken JSON."""
    (tmp_path / "plain.tar.gz").write_bytes(make_tar({"plain.jsonl": json_lines(TEXTS)}, "w:gz"))
    flags = ["--input", tmp_path / "plain.tar.gz", "--tokenizer", tokenizer_file, "--output", tmp_path / "out"]
    code, _, err = preprocess(*flags)
    assert code == 0, err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["documents"] == {"read": 60, "split_at_line_ends": 0, "rejected": {}, "removed": {}}


def test_text_in_an_archive_is_streamed_and_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member may be larger than the disk that temporary files lie on; what must be copied has a limit."""
    from data.sources import archives

    def no_copy(**_: object) -> None:
        raise AssertionError("copied")

    (tmp_path / "x.tar").write_bytes(make_tar({"a.jsonl": json_lines(TEXTS), "b.json": b"", "c.parquet": b"no"}))
    with monkeypatch.context() as patch:
        patch.setattr(archives.tempfile, "TemporaryFile", no_copy)
        texts, rejections = read_file(tmp_path / "x.tar")
    assert texts == TEXTS and [r.kind for r in rejections] == ["empty file", "not a Parquet file"]
    monkeypatch.setattr(archives, "MAX_COPY_BYTES", 100)
    (tmp_path / "x.tar").write_bytes(make_tar({"a.json.gz": gzip.compress(json_lines(TEXTS)), "b.jsonl": json_lines(TEXTS)}))
    texts, rejections = read_file(tmp_path / "x.tar")
    assert texts == TEXTS and [r.kind for r in rejections] == ["file larger than 100 bytes in a tar archive"]


def test_the_copy_of_a_member_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kill left up to 4 GiB in /tmp."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    members = {"c.parquet": parquet(TEXTS[:30]), "d.json.gz": gzip.compress(json_lines(TEXTS[30:]))}
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    left = [os.listdir(folder) for _ in read_blocks([Source(kind="file", name=str(tmp_path / "x.tar"), size=0)], ReadOptions())]
    assert len(left) > 2 and not any(left)


def test_a_full_disk_below_a_copy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output's had room, and the error named none."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "x.tar").write_bytes(make_tar({"c.parquet": parquet(TEXTS)}))
    with no_file_beyond(1000), pytest.raises(OSError) as raised:
        read_file(tmp_path / "x.tar")
    assert sentence(raised.value).startswith(f"{tmp_path}: File too large; make room")


@pytest.mark.parametrize("kind", ["data", "code"])
def test_taken_up_behind_its_last_member_nothing_comes_twice(kind: str, tmp_path: Path) -> None:
    members = {"a.jsonl": json_lines(TEXTS)} if kind == "data" else {f"{i}.py": t.encode() for i, t in enumerate(TEXTS)}
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    found = blocks_of(tmp_path / "x.tar")
    before_last = found[-2].after
    again = blocks_of(tmp_path / "x.tar", before_last)
    assert not any(block.rows or block.lines for block in again)
    assert all((block.after.source, block.after.offset) >= (before_last.source, before_last.offset) for block in again)

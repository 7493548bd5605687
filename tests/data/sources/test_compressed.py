"""Compressed files: what is sound is kept, what is damaged is named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pyarrow
import pytest
from data_helpers import blocks_of, compress, environment, rejections_of, skippable_frame, text_of, zstd_frame
from support import ROOT

from data.sources.blocks import too_long
from data.sources.zstd_frames import frame_ends


def test_gzip_members_before_the_damage_are_kept_and_no_others(tmp_path: Path) -> None:
    members = [gzip.compress(f'{{"content": "document {i}"}}\n'.encode() * 50) for i in range(3)]
    path = tmp_path / "x.json.gz"
    for name, data, kept in [
        ("sound", b"".join(members), 150),
        ("cut in the third", b"".join(members)[:-5], 100),
        ("cut in the only one", members[0][:-5], 0),
        ("checksum of the second", members[0] + members[1][:-8] + b"\0\0\0\0" + members[1][-4:] + members[2], 50),
        ("a bit of the second", members[0] + members[1][:30] + bytes([members[1][30] ^ 1]) + members[1][31:] + members[2], 50),
        ("something else behind it", members[0] + b"garbage that is no gzip", 50),
    ]:
        path.write_bytes(data)
        blocks = blocks_of(path)
        assert text_of(blocks).count(b"\n") == kept, name
        faults = rejections_of(blocks)
        assert ([] if name == "sound" else [(None, True)]) == [(line, "damaged gzip" in reason) for line, reason in faults], name


LINES = [f'{{"content": "document {i}"}}\n'.encode() * 50 for i in range(3)]
SUMMED = [zstd_frame(lines, checksum=True) for lines in LINES]
DAMAGED_ZSTD = [
    ("sound", b"".join(SUMMED), 150),
    ("sound, with skippable frames", skippable_frame(b"x" * 9) + SUMMED[0] + skippable_frame(b"") + SUMMED[1], 100),
    ("cut in the third", b"".join(SUMMED)[:-5], 100),
    ("cut in the third's header", SUMMED[0] + SUMMED[1] + SUMMED[2][:5], 100),
    ("cut in the only one", SUMMED[0][:-5], 0),
    ("checksum of the second", SUMMED[0] + SUMMED[1][:-4] + b"sums" + SUMMED[2], 50),
    ("a bit of the second", SUMMED[0] + SUMMED[1][:30] + bytes([SUMMED[1][30] ^ 1]) + SUMMED[1][31:] + SUMMED[2], 50),
    ("a block that cannot be", SUMMED[0] + SUMMED[1][:6] + b"\xff\xff\xff" + SUMMED[1][9:], 50),
    ("something else behind it", SUMMED[0] + b"garbage that is no zstd", 50),
    ("zeros behind it", SUMMED[0] + SUMMED[1] + bytes(100), 100),
    ("a skippable frame that is cut", SUMMED[0] + skippable_frame(b"x" * 100)[:-1], 50),
]


@pytest.mark.parametrize(("name", "data", "kept"), DAMAGED_ZSTD, ids=[name for name, *_ in DAMAGED_ZSTD])
def test_zstd_frames_before_the_damage_are_kept_and_no_others(name: str, data: bytes, kept: int, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(data)
    blocks = blocks_of(path)
    assert text_of(blocks) == b"".join(LINES)[: sum(map(len, LINES[: kept // 50]))]
    assert ["damaged zstd" in reason for _, reason in rejections_of(blocks)] == ([] if name.startswith("sound") else [True])


def test_frames_end_where_other_writers_end_them(tmp_path: Path) -> None:
    """Arrow's and libzstd's, compressed for real: with a size, one segment or a window, long runs (RLE blocks), many blocks."""
    runs, noise = b"\0" * (1 << 20), random.Random(0).randbytes(300_000)
    contents = [b"", b"x", b"x" * 300, b"ab" * 40_000, runs, noise, noise + runs + b"end"]
    frames = [compress(content, "zst") for content in contents]
    for content in contents:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        frames.append(sink.getvalue().to_pybytes())
    with io.BytesIO(b"".join(frames) + b"behind") as file:
        assert list(frame_ends(file)) == list(accumulate(map(len, frames)))


def test_zstd_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(compress(b"one\n", "zst") + compress(b"two\n", "zst"))
    assert text_of(blocks_of(path)) == b"one\ntwo\n"


BOMB = """
import sys
from itertools import accumulate
from pathlib import Path
from data_helpers import read_file
texts, rejections = read_file(Path(sys.argv[1]))
# Not ru_maxrss, in which a started process inherits its parent's.
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10
print(len(texts), [(r.line, r.kind) for r in rejections], peak, sep="|")
"""


def zstd_bomb(megabytes: int) -> bytes:
    """Blocks of one repeated byte (RFC 8878, RLE_Block): four bytes for 128 KiB."""
    blocks = [struct.pack("<I", (1 << 17) << 3 | 1 << 1)[:3] + b"x"] * (8 * megabytes - 1)
    return zstd_frame(b"")[:6] + b"".join(blocks) + struct.pack("<I", (1 << 17) << 3 | 1 << 1 | 1)[:3] + b"x"


PACKERS = {"gzip": gzip.compress, "zstd": zstd_frame, "bzip2": bz2.compress, "xz": lzma.compress}


def bomb(kind: str) -> tuple[bytes, int]:
    """(compressed bytes, megabytes that they are) of one letter, in as many members as it takes."""
    if kind == "zstd":
        return zstd_bomb(2000), 2000
    return PACKERS[kind](b"x" * (20 << 20)) * 25, 500


@pytest.mark.parametrize("kind", ["gzip", "zstd", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bzip2", "xz"))])
def test_a_bomb_is_one_rejected_line_between_two_documents(kind: str, tmp_path: Path) -> None:
    """A line of hundreds of megabytes in a file of kilobytes: memory stays what a line may have."""
    pack, (letters, megabytes) = PACKERS[kind], bomb(kind)
    data = pack(b'{"content": "first"}\n') + letters + pack(b'\n{"content": "last"}\n')
    assert len(data) < megabytes << 13
    (tmp_path / "x.jsonl").write_bytes(data)
    environ = {**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/data'}"}
    line = [sys.executable, "-c", BOMB, str(tmp_path / "x.jsonl")]
    done = subprocess.run(line, capture_output=True, text=True, env=environ, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    count, rejections, peak = done.stdout.strip().split("|")
    assert count == "2" and rejections == f"[(2, '{too_long()}')]"
    assert int(peak) < 400, peak

"""What happens to folders while a run goes on or before it does: deleted, without config.json, other bytes on one of the hosts."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from runs import Site, assert_same, content, last_saved, rows, struck
from support import metrics

OTHER_BYTES = str(Path(__file__).with_name("other_bytes.py"))


def test_a_folder_deleted_under_a_run_is_said_and_made_anew(site: Site, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = site.start(run, pause_at="0/5/forward")
    running.until_paused(0, " at step 5, forward")
    shutil.rmtree(run)
    running.signal(signal.SIGCONT, [0])
    assert running.wait() == [0, 0], running.text()[-6000:]
    struck("the run's folder deleted")
    assert f"{run} was deleted, moved or replaced while the run goes on" in running.text()
    assert last_saved(run) == "step_12" and content(run) == content(whole)
    assert {"config.json", "metrics.jsonl", "tokenizer", ".lock"} <= {path.name for path in run.iterdir()}
    assert [row["step"] for row in metrics(run) if "loss" in row][-1] == 12
    again = site.finish(run, max_steps=13).text()
    assert "step_12 (step 12" in again, "what was saved afterwards is a run's"


@pytest.mark.parametrize("left", ["missing", "empty"])
def test_checkpoints_without_config_json_are_gone_on_from(site: Site, whole: Path, tmp_path: Path, left: str) -> None:
    """A power cut leaves an empty file of one that was not synced; a person deletes it."""
    run = tmp_path / "run"
    site.finish(run, stop_after=5)
    (run / "config.json").write_bytes(b"") if left == "empty" else (run / "config.json").unlink()
    said = site.finish(run).text()
    struck(f"config.json {left}")
    assert "config.json is missing or empty" in said and "step_5 (step 5" in said
    assert_same(run, whole)
    assert json.loads((run / "config.json").read_text())["seed"] == 1234


def test_without_config_json_another_run_is_still_refused(site: Site, tmp_path: Path) -> None:
    run = tmp_path / "run"
    site.finish(run, stop_after=2)
    (run / "config.json").unlink()
    refused = site.start(run, seed=4321)
    assert refused.wait() == [2, 2]
    assert "belongs to another run: seed: 1234 -> 4321" in refused.text()


def test_other_bytes_on_another_host_are_refused_at_the_start(site: Site, tmp_path: Path) -> None:
    """The same names, sizes and manifest: nothing else would tell but the losses."""
    for rank in (0, 1):
        shutil.copytree(site.shards, tmp_path / f"host{rank}" / "shards")
    path = next((tmp_path / "host1" / "shards" / "train").glob("*.bin"))
    half, data = path.stat().st_size // 2, path.read_bytes()
    path.write_bytes(data[half:] + data[:half])
    refused = site.start(tmp_path / "run", script=OTHER_BYTES, data="shards", env={"HOSTS": str(tmp_path)})
    assert refused.wait() == [2, 2], refused.text()[-3000:]
    struck("other bytes in one host's shards")
    assert "the ranks differ in the shards' bytes" in refused.text() and "rank 1" in refused.text()
    assert not rows(tmp_path / "run") if (tmp_path / "run" / "metrics.jsonl").exists() else True

"""The page as text: whole, bounded in size, and harmless whatever names, errors and generations hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_runs import CONFIG, healthy_rows, write_run

from launch.reporting.evaluations import Evaluation, Generation
from launch.reporting.page import MOST_BYTES, as_script_json, build_page
from launch.reporting.read import Run, read_run

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&quot;'\"\u2028"


class Outline(HTMLParser):
    """Tags with their attributes, and the text of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "first"))


def test_nothing_is_fetched(run: Run) -> None:
    outline = Outline(build_page([run], {}))
    assert not [tag for tag, attributes in outline.tags if {"src", "href", "srcset", "action"} & set(attributes)]
    policies = [a.get("content") or "" for tag, a in outline.tags if tag == "meta" and "http-equiv" in a]
    assert any(policy.startswith("default-src 'none'") and "http" not in policy for policy in policies)
    assert len(outline.scripts) == 6


def test_names_that_would_end_a_script(run: Run, tmp_path: Path) -> None:
    rows = healthy_rows()
    rows[5]["skipped"] = f"loss is {EVIL}"
    rows[6][EVIL] = 1.0
    other = read_run(write_run(tmp_path / "second", rows, git_commit=EVIL, **{EVIL: EVIL}))
    run.name = other.name = EVIL
    other.name += "2"
    evaluation = Evaluation(name=EVIL, figures={"loss": 1.0}, generations=[Generation(title=EVIL, text=EVIL, passed=False)])
    page = build_page([run, other], {run.name: [evaluation], other.name: []})
    harmless = Outline(build_page([run], {}))
    outline = Outline(page)
    assert len(outline.scripts) == len(harmless.scripts) and "img" not in {tag for tag, _ in outline.tags}
    assert outline.data["runs"][0]["name"] == EVIL
    assert "alert(1)</script>" not in page and "<img" not in page


def test_json_in_a_script_reads_back() -> None:
    text = as_script_json({EVIL: [EVIL, 1.5, None]})
    assert "<" not in text and ">" not in text and "\u2028" not in text
    assert json.loads(text) == {EVIL: [EVIL, 1.5, None]}


@pytest.mark.parametrize("runs", [1, 3, 12])
def test_the_page_keeps_its_size(tmp_path: Path, runs: int) -> None:
    """48 layers, and metrics that the catalogue does not know."""

    def change(row: dict) -> None:
        row.update({f"metric_{i}": row["loss"] * i / 7 for i in range(30)})
        row["expert_load"] = None

    rows = healthy_rows(1500, 1, change, layers=48)
    rows += [{"step": step, "expert_load": [[step % 7, 1, 2, 3] * 16] * 48} for step in range(1, 300)]
    write_run(tmp_path / "run", rows)
    page = build_page([read_run(tmp_path / "run") for _ in range(runs)], {})
    assert len(page.encode()) < MOST_BYTES
    assert "metric_17" in {chart["key"] for chart in Outline(page).data["charts"]}


def test_settings_that_differ_and_no_others(run: Run, tmp_path: Path) -> None:
    other = {"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}, "gradient_clipping": 1.0}
    second = read_run(write_run(tmp_path / "second", seed=7, deepspeed=other, host="node-2"))
    page = build_page([run, second], {})
    table = re.search(r'id="differences">(.*?)</div></div>', page, re.DOTALL)
    assert table is not None
    assert re.findall(r"<code>(.*?)</code>", table[1]) == ["deepspeed.optimizer.params.lr", "0.0003", "0.001", "seed", "1234", "7"]


def test_a_single_run_shows_its_settings_and_state(run: Run) -> None:
    page = build_page([run], {})
    for text in ("No red flags", "8, top 2", "AdamW", "finished", "1,000"):
        assert text in page
    unfinished = {**CONFIG, "arguments": {**CONFIG["arguments"], "max_steps": 4000}}
    run.config = unfinished
    page = build_page([run], {})
    assert "running" in page and "width:25.00%" in page


def test_flags_stand_in_words_at_the_top(tmp_path: Path) -> None:
    rows = healthy_rows(change=lambda row: row.update(grad_norm=25.0))
    page = build_page([read_run(write_run(tmp_path / "run", rows))], {})
    flag = page.index("Act now: Gradient norm over 10")
    assert page.index("<h1>") < flag < page.index('id="charts"') and "lower the learning rate" in page[flag : flag + 600]


def test_pass_at_k_and_generations(run: Run) -> None:
    generation = Generation(title="HumanEval/0", text="def f(x):\n    return x < 1\n", passed=True)
    figures = {"loss": 1.2345, "pass@10": 0.5, "pass@1": 0.123}
    evaluation = Evaluation(name="e.json", figures=figures, intervals={"pass@1": (0.05, 0.2)}, generations=[generation])
    page = build_page([run], {run.name: [evaluation]})
    assert page.index("pass@1<") < page.index("pass@10<") and "12.3% (5.0% to 20.0%)" in page and "1.234" in page
    assert "return x &lt; 1" in page and "HumanEval/0" in page

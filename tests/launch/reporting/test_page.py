"""The page as text: whole, bounded in size, and harmless whatever names, errors and generations hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_runs import CONFIG, healthy_rows, write_run

from launch.reporting.evaluations import Evaluation, Generation
from launch.reporting.page import ASSETS, MOST_BYTES, as_script_json, build_page
from launch.reporting.read import Run, read_run

BEYOND = 10**400  # a float's largest
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
    assert len(outline.scripts) == 7


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


def test_runs_without_settings_are_left_out_of_the_differences(run: Run, tmp_path: Path) -> None:
    """One of them lacked every setting of the others, and each became a row."""
    others = [read_run(write_run(tmp_path / name, seed=seed)) for name, seed in (("second", 7), ("third", 8))]
    (tmp_path / "second" / "config.json").unlink()
    page = build_page([run, read_run(tmp_path / "second"), others[1]], {})
    table = re.search(r'id="differences">(.*?)</div></div>', page, re.DOTALL)
    assert table is not None and re.findall(r"<code>(.*?)</code>", table[1]) == ["seed", "1234", "8"]
    assert re.findall(r'data-run="(\d)"', table[1]) == ["0", "2"] and "left out: second." in page


def test_a_configuration_of_somebody_elses_program(tmp_path: Path) -> None:
    page = build_page([read_run(write_run(tmp_path / "run", git_commit=5))], {})
    assert "<dt>Commit</dt><dd>5</dd>" in page
    (tmp_path / "run" / "config.json").unlink()
    assert "Balance" not in build_page([read_run(tmp_path / "run")], {})


def test_saves_have_their_chart(run: Run) -> None:
    assert "save_seconds" in {chart["key"] for chart in Outline(build_page([run], {})).data["charts"]}


def luminance(color: str) -> float:
    """Relative, as WCAG 2 has it."""
    linear = [
        (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [":root", ':root[data-theme="dark"]'])
def test_small_text_has_the_contrast_that_wcag_asks_for(theme: str) -> None:
    css = (ASSETS / "report.css").read_text()
    colors = dict(re.findall(r"--(\w+): (#\w{6})", css[css.index(theme + " {") :].partition("}")[0]))
    for text in ("faint", "muted"):
        for ground in ("card", "bg"):
            high, low = sorted((luminance(colors[text]), luminance(colors[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


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


@pytest.mark.parametrize("row", [{"val_loss": BEYOND}, {"eval/y": BEYOND}, {"val_loss": 2.0, "val_bits_per_byte": BEYOND}])
def test_a_number_that_no_float_holds_ends_no_report(row: dict[str, float], tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [*healthy_rows(50), {"step": 50, **row}]))
    assert str(BEYOND) not in build_page([run], {})

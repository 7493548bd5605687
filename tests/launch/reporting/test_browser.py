"""The page in a real browser: nothing on the console, values under the mouse, axes, zoom, themes, a phone's width, paper, speed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, DRIVER, MISSING, Browser, start_browser
from made_up_runs import CONFIG, TOKENS, expected_loss, healthy_rows, write_run

from launch.reporting.page import build_page
from launch.reporting.read import read_run

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)
LOSS = '[data-metric="loss"]'
EVIL = "</script><script>document.title='struck'</script><img src=x onerror=\"document.title='struck'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with start_browser() as browser:
        yield browser


@pytest.fixture(autouse=True)
def nothing_on_the_console(browser: Browser) -> Iterator[None]:
    browser.size(1280, 900)
    browser.prefer("light")
    browser.errors()
    yield
    assert browser.errors() == []


def write_page(tmp_path: Path, *names: str, **changes: object) -> Path:
    """A page of a run a name; `changes` go to `healthy_rows`. The second run logs other steps than the first."""
    runs = []
    for number, name in enumerate(names or ("first",)):
        rows = healthy_rows(every=5 if number == 0 else 7, **changes)
        for step in range(100, 1001, 100):
            rows.append({"step": step, "expert_load": [[9, 1, 5, 5, 5, 5, 5, 5]] * 4, "update_to_weight": {"decay": 1e-3}})
        run = read_run(write_run(tmp_path / f"run{number}", rows, seed=number))
        run.name = name
        runs.append(run)
    page = tmp_path / "page.html"
    page.write_text(build_page(runs, {}), encoding="utf-8")
    return page


def tip(browser: Browser, card: str) -> str:
    return browser.script("return document.querySelector(arguments[0]).innerText", f"{card} .tip")


def test_hover_shows_the_values_of_that_step(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path))
    browser.hover(f"{LOSS} .u-over", 0.5, 0.5)
    text = tip(browser, LOSS)
    step = int(re.search(r"step ([\d,]+)", text)[1].replace(",", ""))
    assert 450 < step < 550
    shown = [float(x) for x in re.findall(r"\t([\d.]+)", text)]
    assert len(shown) == 2 and all(abs(x - expected_loss(step)) < 0.15 for x in shown), text
    assert "validation" in text and "tokens" in text and ("h" in text or "min" in text)
    # The other charts' heads follow the same cursor.
    rate = browser.script("return document.querySelector('[data-metric=\"lr\"] .now').innerText")
    assert float(rate) == pytest.approx(3e-4)


def test_runs_lie_over_each_other_by_step_tokens_and_hours(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path, "first", EVIL))
    assert browser.script("return document.title").startswith("2 runs")  # and not 'struck'
    for unit, end in (("step", 1000.0), ("tokens", 1000.0 * TOKENS), ("hours", 1000 * TOKENS / 380_000 / 3600)):
        browser.script("document.querySelector(`[data-value='${arguments[0]}']`).click()", unit)
        low, high = browser.script("const { min, max } = Report.charts[0].u.scales.x; return [min, max]")
        assert high == pytest.approx(end, rel=0.02) and low < 0.05 * high
        browser.hover(f"{LOSS} .u-over", 0.6, 0.5)
        text = tip(browser, LOSS)
        assert "first" in text and "</script>" in text and len(re.findall(r"\t[\d.]+", text)) == 4
    browser.script("document.querySelectorAll('.runs button')[1].click()")
    browser.hover(f"{LOSS} .u-over", 0.6, 0.5)
    assert "</script>" not in tip(browser, LOSS)


def test_zoom_holds_for_all_charts_and_over_a_reload(browser: Browser, tmp_path: Path) -> None:
    page = write_page(tmp_path)
    browser.open(page)
    browser.drag(f"{LOSS} .u-over", 0.2, 0.4)
    ranges = browser.script("return Report.charts.map((chart) => [chart.u.scales.x.min, chart.u.scales.x.max])")
    assert len({tuple(pair) for pair in ranges}) == 1
    assert 180 < ranges[0][0] < 230 and 380 < ranges[0][1] < 430
    browser.open(page)
    assert browser.script("return Report.state.range") == ranges[0]
    browser.script("document.getElementById('reset').click()")
    assert browser.script("return Report.charts[0].u.scales.x.max") == 1000


def test_a_flat_curve_is_drawn_flat(browser: Browser, tmp_path: Path) -> None:
    """`mfu` is 0.41 in every row: what smoothing leaves of rounding must not fill the chart."""
    browser.open(write_page(tmp_path))
    chart = "Report.charts.find((c) => c.u.root.closest('[data-metric]').dataset.metric === 'mfu').u.scales.y"
    low, high = browser.script(f"const {{ min, max }} = {chart}; return [min, max]")
    assert low < 0.40 < 0.41 < 0.42 < high


def test_log_axis_and_smoothing(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path))
    distribution = "return Report.charts[0].u.scales.y.distr"
    assert browser.script(distribution) == 1
    browser.script(f"document.querySelector('{LOSS} .log').click()")
    assert browser.script(distribution) == 3
    for weight in (0, 0.9):
        script = "const s = document.getElementById('smooth'); s.value = arguments[0]; s.dispatchEvent(new Event('input'));"
        script += "const c = Report.charts[0]; const i = c.series.findIndex((s) => s.role === 'line');"
        line = browser.script(script + "return c.u.data[i + 1].filter((y) => y !== undefined && y !== null)", weight)
        raw = json.loads(re.search(r'"loss":{"y":(\[[^\]]*\])', (tmp_path / "page.html").read_text())[1])
        total = norm = 0.0
        for value, drawn in zip(raw, line, strict=True):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
            assert drawn == pytest.approx(total / norm, rel=1e-9)


def test_heat_map_names_layer_expert_step_and_value(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path, change=lambda row: row.update(load_max_over_mean=[1.0, 1.0, 3.0, 1.0])))
    browser.hover(".heat canvas", 0.5, 0.52)
    text = browser.script("return document.querySelector('.heat .tip').innerText")
    assert text.startswith("layer 2, step ") and text.endswith("\n2")
    browser.script(
        "const s = document.querySelector('#heat select'); s.value = 'expert_load'; s.dispatchEvent(new Event('change'));"
    )
    browser.hover(".heat canvas", 0.5, 0.01)
    text = browser.script("return document.querySelector('.heat .tip').innerText")
    assert "layer 0, expert 0" in text and "1.8 × its fair share" in text


def test_marks_are_told_where_they_happened(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path))
    browser.hover(f"{LOSS} .u-over", 0.4975, 0.5)  # from step 5 to 1000: step 500
    assert "checkpoint step_500" in tip(browser, LOSS)
    assert browser.script("return document.querySelector('.key').innerText").split() == ["▲", "checkpoint"]


def test_dark_phone_and_paper(browser: Browser, tmp_path: Path) -> None:
    page = write_page(tmp_path, "first", "a" * 120)
    background = "return getComputedStyle(document.body).backgroundColor"
    browser.open(page)
    light = browser.script(background)
    browser.prefer("dark")
    browser.frames()
    dark = browser.script(background)
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 120 < 600 < sum(map(int, re.findall(r"\d+", light)[:3]))
    assert len(browser.printed()) > 20_000
    assert browser.script(background) == dark  # white paper, and dark again after it
    browser.size(390, 844, phone=True)
    browser.open(page)
    overflow = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.script(overflow) <= 0
    widths = browser.script("return Report.charts.map((chart) => chart.u.width)")
    assert max(widths) <= 390 and min(widths) > 200


def test_a_run_without_a_step_opens(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(build_page([read_run(write_run(tmp_path / "run", []))], {}), encoding="utf-8")
    browser.open(page)
    text = browser.script("return document.body.innerText")
    assert "Nothing is logged yet" in text and "No red flags" not in text and "Smoothing" not in text


def test_a_short_run_in_a_narrow_range(browser: Browser, tmp_path: Path) -> None:
    """Ticks that differ in what they say, no parts of a step, one stretch of steps for all charts, and with several runs heads that
    stay in their cards on a phone."""
    rows = [{"step": n, "samples": n, "tokens": n, "loss": 7.636 + 0.001 * n, "max_vio": [0.1 * n]} for n in (1, 2, 3)]
    rows.insert(0, {"step": 0, "val_loss": 7.634, "val_bits_per_byte": 3.51})
    runs = [read_run(write_run(tmp_path / f"run{number}", rows)) for number in range(4)]
    page = tmp_path / "page.html"
    page.write_text(build_page(runs, {}), encoding="utf-8")
    browser.size(390, 844, phone=True)
    browser.open(page)
    axes = browser.script("return Report.charts.map(({ u }) => u.axes.map((axis) => axis._values))")
    assert len(axes) >= 3
    for steps, values in axes:
        assert set(steps) <= {"0", "1", "2", "3"} and len(steps) >= 2
        shown = [value for value in values if value]
        assert len(shown) >= 2 and len(set(shown)) == len(shown), values
    assert browser.script("return Report.charts.every(({ u }) => u.scales.x.min === 0 && u.scales.x.max === 3)")
    assert browser.script("return document.documentElement.scrollWidth - window.innerWidth") <= 0
    outside = "return [...document.querySelectorAll('.chart header')].filter((h) => h.scrollWidth > h.clientWidth).length"
    assert browser.script(outside) == 0


def test_a_hundred_thousand_steps_open_in_two_seconds(browser: Browser, tmp_path: Path) -> None:
    """The main thread's work, which is what a busy machine leaves as it is; a page of 24 layers at full detail."""
    rows = [row for row in healthy_rows(4000, 1, layers=24) if "loss" in row]  # more rows than points: the page is as large
    for number, row in enumerate(rows):
        row["step"] = number * 25 + 25
    arguments = {**CONFIG["arguments"], "max_steps": 100_000}
    page = tmp_path / "page.html"
    page.write_text(build_page([read_run(write_run(tmp_path / "run", rows, arguments=arguments))], {}), encoding="utf-8")
    assert page.stat().st_size > 300_000
    browser.devtools("Performance.enable", timeDomain="threadTicks")
    began = time.monotonic()
    browser.open(page)
    metrics = {m["name"]: m["value"] for m in browser.devtools("Performance.getMetrics")["metrics"]}
    print(f"{metrics['TaskDuration']:.2f} s of work, {time.monotonic() - began:.2f} s by the clock")
    assert 0 < metrics["TaskDuration"] < 2

"""The page in a real browser: nothing on the console, values under the mouse, axes, zoom, themes, a phone's width, paper, speed."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, DRIVER, MISSING, Browser, start_browser
from made_up_runs import CONFIG, TOKENS, Row, expected_loss, healthy_rows, write_run

from launch.reporting import page as page_module
from launch.reporting.evaluations import Evaluation, Generation
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


FEW = [*({"step": step, "loss": 2.0} for step in range(1, 13)), {"step": 6, "val_loss": 2.5}]


def write_rows(folder: Path, *rows: list[Row], names: list[str] | None = None) -> Path:
    """A page of a run for each list of rows."""
    runs = [read_run(write_run(folder / f"run{number}", some)) for number, some in enumerate(rows)]
    for run, name in zip(runs, names or [], strict=False):
        run.name = name
    page = folder / "page.html"
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
    rows = [json.loads(line) for line in (tmp_path / "run0" / "metrics.jsonl").read_text().splitlines()]
    logged = next(row["loss"] for row in rows if row["step"] == step and "loss" in row)
    assert shown[0] == pytest.approx(logged, rel=1e-4) and re.search(r"smoothed [\d.]+", text), text
    assert float(browser.script(f"return document.querySelector('{LOSS} .now span').innerText")) == pytest.approx(logged, rel=1e-3)
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
        assert "first" in text and "struck" in text and len(re.findall(r"\t[\d.]+", text)) == 4
    browser.script("document.querySelectorAll('.runs button')[1].click()")
    browser.hover(f"{LOSS} .u-over", 0.6, 0.5)
    assert "struck" not in tip(browser, LOSS)


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
    for is_log, weight in ((False, 0), (False, 0.9), (True, 0.9)):
        if is_log:
            browser.script(f"document.querySelector('{LOSS} .log').click()")
        assert browser.script(distribution) == (3 if is_log else 1)
        script = "const s = document.getElementById('smooth'); s.value = arguments[0]; s.dispatchEvent(new Event('input'));"
        script += "const c = Report.charts[0]; const i = c.series.findIndex((s) => s.role === 'line');"
        line = browser.script(script + "return c.u.data[i + 1].filter((y) => y !== undefined && y !== null)", weight)
        raw = json.loads(re.search(r'"loss":{"y":(\[[^\]]*\])', (tmp_path / "page.html").read_text())[1])
        total = norm = 0.0
        for value, drawn in zip(raw, line, strict=True):
            total, norm = weight * total + (1 - weight) * (math.log(value) if is_log else value), weight * norm + (1 - weight)
            assert drawn == pytest.approx(math.exp(total / norm) if is_log else total / norm, rel=1e-9)


def test_a_skipped_step_lifts_no_curve(browser: Browser, tmp_path: Path) -> None:
    """Neither the loss for ten steps nor perplexity, whose values lie forty decades apart, for the rest of the run."""
    rows = [{"step": step, "loss": 5.0, "perplexity": math.exp(5)} for step in range(1, 41)]
    rows[9].update(loss=105.0, perplexity=math.exp(105), skipped="a spike")
    rows[19].update(loss=15.0, perplexity=math.exp(15))  # was taken
    browser.open(write_rows(tmp_path, rows))
    script = "return arguments[0].map((key) => { const c = Report.charts.find((c) => c.metric.key === key);"
    script += "return ['line', 'raw'].map((role) => c.u.data[c.series.findIndex((s) => s.role === role) + 1]); })"
    (loss, raw), (perplexity, _) = browser.script(script, ["loss", "perplexity"])
    assert raw[9] == 105 and loss[:19] == pytest.approx([5.0] * 19)
    assert [math.log(value) for value in perplexity] == pytest.approx(loss, rel=1e-4)  # the mean of logarithms, as loss is one


def test_a_run_has_no_values_where_it_has_not_been(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_rows(tmp_path, FEW, [{"step": step, "loss": 3.0} for step in range(100, 10_001, 100)]))
    browser.hover(f"{LOSS} .u-over", 0.5, 0.5)
    text = tip(browser, LOSS)
    assert text.splitlines()[0] == "step 5,000" and "run1" in text and "run0" not in text
    assert browser.script(f"return document.querySelector('{LOSS} .now').innerText") == "3"
    browser.open(write_rows(tmp_path / "alone", FEW))
    browser.hover(f"{LOSS} .u-over", 0.75, 0.5)
    assert "step 9" in tip(browser, LOSS) and "validation (step 6)" in tip(browser, LOSS)


@pytest.mark.parametrize("width", [1280, 400])
def test_many_runs_with_long_names(browser: Browser, tmp_path: Path, width: int) -> None:
    """Names that differ at both ends, some alike for 40 characters; what is shown of a curve stays on the screen."""
    names = [f"learning_rate_{n}_muon_experts_32_groups_4_with_a_long_name_seed_{n % 4}" for n in range(12)]
    page = write_rows(
        tmp_path, *([{**row, "loss": 2.0 + n} for row in FEW if "loss" in row] + FEW[-1:] for n in range(12)), names=names
    )
    browser.size(width, 900, phone=width == 400)
    browser.open(page)
    browser.hover(f"{LOSS} .u-over", 0.5, 0.05)
    lines = tip(browser, LOSS).splitlines()
    assert len([line for line in lines if "\t" in line]) == 8 and "and 16 further from the mouse" in lines
    assert any(line.startswith("11_muon") and "seed_3" in line for line in lines), lines  # the highest, where the mouse is
    left, right = browser.script(
        f"const r = document.querySelector('{LOSS} .tip').getBoundingClientRect(); return [r.left, r.right]"
    )
    assert 0 <= left < right <= width and browser.script("return document.documentElement.scrollWidth") <= width
    assert len(set(browser.script("return Report.names"))) == 12
    assert browser.script(f"return document.querySelector('{LOSS} .now').innerText") == ""  # no room for twelve
    looks = browser.script("return Report.names.map((_, i) => `${Report.runColor(i)} ${Report.runDash(i)}`)")
    assert len(set(looks)) == 12
    swatches = "return [...document.querySelectorAll('.runs .swatch')].map((s) => getComputedStyle(s).backgroundImage)"
    assert len(set(browser.script(swatches))) == 12


def test_names_in_short(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_rows(tmp_path, FEW))
    short = "return Report.shortNames(arguments[0], 12)"
    assert browser.script(short, ["first", "first_again"]) == ["first", "first_again"]
    assert browser.script(short, ["sweep_lr_0.001", "sweep_lr_0.002"]) == ["0.001", "0.002"]
    assert browser.script(short, ["abcdefghijklmnopqrst"]) == ["abcde…opqrst"]


def test_numbers_and_ticks_of_any_size(browser: Browser, tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0, "perplexity": 10.0 ** (step * 7), "lr": 0.001805 + step * 1e-7} for step in range(1, 41)]
    browser.size(400, 900, phone=True)
    browser.open(write_rows(tmp_path, rows))
    assert browser.script("return document.documentElement.scrollWidth") <= 400
    formats = browser.script("return [9e14, 1.2345e17, -2e15, 1e308].map((x) => Report.format(x))")
    assert formats == ["900T", "1.23e17", "-2e15", "1e308"]
    axis = "const a = Report.charts.find((c) => c.metric.key === arguments[0]).u.axes[1]; return [a._values, a._size]"
    decades = [label for label in browser.script(axis, "perplexity")[0] if label]
    assert 3 <= len(decades) <= 7 and decades[-1].startswith("1e"), decades
    labels, size = browser.script(axis, "lr")
    assert size >= 6.2 * max(map(len, labels)) + 10, (labels, size)
    assert browser.script("return Report.ticks(null, [5000, 10000, 15000])") == ["5K", "10K", "15K"]
    splits = "return Report.logSplits(null, 1, ...arguments[0])"
    assert browser.script(splits, [0.2, 30]) == [*(n / 10 for n in range(2, 10)), *range(1, 10), 10, 20, 30]
    assert browser.script("return Report.logTicks(null, [2, 3, 4, 5, 6])") == ["2", "", "", "5", ""]


def test_a_single_point_is_seen(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_rows(tmp_path, [{"step": 1, "loss": 2.0}]))
    shows = "const { u } = Report.charts[0]; return u.series.slice(1).map((s) => s.points.show(u, 1, 0, 0))"
    assert True in browser.script(shows)


def test_a_page_that_loads_itself_keeps_the_readers_place(browser: Browser, tmp_path: Path) -> None:
    generations = [Generation(title=title, text="pass", passed=None) for title in ("T/0", "T/1")]
    run = read_run(write_run(tmp_path / "run", FEW))
    page = tmp_path / "page.html"
    evaluation = Evaluation(name="e", figures={"loss": 1.0}, generations=generations)
    page.write_text(build_page([run], {run.name: [evaluation]}), encoding="utf-8")
    browser.open(page)
    browser.script("document.querySelectorAll('summary')[1].click(); document.getElementById('smooth').focus(); Report.keepPlace()")
    browser.open(page)
    assert browser.script("return [...document.querySelectorAll('details')].map((d) => d.open)") == [False, True]
    assert browser.script("return document.activeElement.id") == "smooth"


def test_a_click_is_no_zoom(browser: Browser, tmp_path: Path) -> None:
    """A click gave its chart the focus; the next chart's click took it away, which moved the cursor under its own mouse."""
    browser.open(write_page(tmp_path))
    for metric in ("loss", "grad_norm", "lr"):
        browser.drag(f'[data-metric="{metric}"] .u-over', 0.5, 0.5)
        assert browser.script("return [Report.state.range, document.activeElement.tagName]") == [None, "BODY"], metric


def test_keys_move_the_cursor_of_all_charts(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path))
    plot = f"document.querySelector('{LOSS} .plot')"
    browser.script(f"{plot}.focus()")
    for key, code in (("Home", 36), ("ArrowRight", 39), ("ArrowRight", 39), ("ArrowLeft", 37)):
        browser.devtools("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code)
    browser.frames()
    assert tip(browser, LOSS).startswith("step 10 ")
    assert float(browser.script("return document.querySelector('[data-metric=\"lr\"] .now').innerText")) == pytest.approx(3e-5)
    label, value = browser.script(f"return ['aria-label', 'aria-valuetext'].map((name) => {plot}.getAttribute(name))")
    assert label == "Loss" and value.startswith("step 10: Loss ")
    browser.script(f"{plot}.blur()")
    browser.frames()
    assert browser.script(f"return document.querySelector('{LOSS} .tip').style.display") == "none"
    assert "step 1,000" in browser.script(f"return {plot}.getAttribute('aria-valuetext')")
    buttons = browser.script("return [...document.querySelectorAll('button.log')].map((b) => b.getAttribute('aria-label'))")
    assert len(set(buttons)) == len(buttons) and "logarithmic axis of Loss" in buttons


def test_what_paper_says_in_place_of_the_toolbar(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path))
    browser.script("document.querySelector(\"[data-value='tokens']\").click()")
    assert "From left to right: tokens. Curves are smoothed" in browser.script(
        "return document.querySelector('.caption').innerText"
    )


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
    browser.script("document.querySelector('.heat canvas').focus()")
    for key, code in (("ArrowLeft", 37), ("ArrowLeft", 37), ("ArrowDown", 40)):
        browser.devtools("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code)
    label = browser.script("return document.querySelector('.heat canvas').getAttribute('aria-label')")
    assert label.startswith("Load of every expert over its fair share, first: layer 0, expert 1, step 900") and "0.2 ×" in label


def test_merged_experts_are_named_as_a_group(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "CELLS", 4 * 2 * 2 * 8)  # of four layers of eight experts
    browser.open(write_page(tmp_path))
    browser.script(
        "const s = document.querySelector('#heat select'); s.value = 'expert_load'; s.dispatchEvent(new Event('change'));"
    )
    browser.hover(".heat canvas", 0.5, 0.01)
    assert "layer 0, experts 0 to 3, the least" in browser.script("return document.querySelector('.heat .tip').innerText")
    browser.hover(".heat canvas", 0.5, 0.81)  # below it are the steps
    assert "layer 3, experts 4 to 7, the greatest" in browser.script("return document.querySelector('.heat .tip').innerText")
    text = browser.script("return document.querySelector('.heat header').innerText")
    assert "4 layers of 8 experts, least and greatest of each 4" in text


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


def test_no_tile_is_cut(browser: Browser, tmp_path: Path) -> None:
    """`118 minutes`, and what stands below it, in the narrowest row of eight tiles."""
    arguments = {**CONFIG["arguments"], "max_steps": 6150}
    page = tmp_path / "page.html"
    page.write_text(build_page([read_run(write_run(tmp_path / "run", arguments=arguments))], {}), encoding="utf-8")
    browser.size(1180, 900)
    browser.open(page)
    assert "118 minutes" in browser.script("return document.body.innerText")
    cut = "return [...document.querySelectorAll('.tile div')].filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.innerText)"
    assert browser.script(cut) == []


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

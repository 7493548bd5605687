"""The HTML file: what can be said in words is in it as text, the rest as JSON that its scripts draw. Nothing is fetched."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from launch.reporting.catalogue import GROUPS, METRICS, describe
from launch.reporting.curves import curves_of, per_layer_columns, points_each
from launch.reporting.evaluations import Evaluation
from launch.reporting.flags import flags_of
from launch.reporting.heat_map import CELLS, heat_maps_of
from launch.reporting.read import Mark, Run
from launch.reporting.sections import flags_html, header_html, sections_html, summary_html

ASSETS = Path(__file__).parent / "assets"
STYLES = ("uPlot-1.6.32.min.css", "report.css")
SCRIPTS = ("uPlot-1.6.32.iife.min.js", "page.js", "axes.js", "charts.js", "readout.js", "heat_map.js")
MOST_BYTES = 600_000
LEAST_DETAIL = 0.1
MARKS = 400  # of one kind and run
#: Noisy from step to step, so that a smoothed curve says more than the raw one. The others are drawn as they are.
STEADY = frozenset({"lr", "unused_experts", "bias_range", "clipped_share", "memory_gb"})
#: What is not in every row and drawn into the chart of a metric.
POINTS_IN = {"loss": ["val_loss"], "val_bits_per_byte": ["val_bits_per_byte"], "save_seconds": ["save_seconds"]}


def build_page(runs: list[Run], evaluations: dict[str, list[Evaluation]], *, follow: float = 0.0) -> str:
    """At most MOST_BYTES: with many runs or metrics, less detail. `follow`: seconds until the page loads itself anew."""
    detail = 1.0
    while True:
        page = _assemble(runs, evaluations, detail, follow)
        if len(page.encode(errors="replace")) <= MOST_BYTES or detail < LEAST_DETAIL:
            return page
        detail /= 2


def _assemble(runs: list[Run], evaluations: dict[str, list[Evaluation]], detail: float, follow: float) -> str:
    return Template(_asset("page.html")).substitute(
        title=header_html(runs, only_title=True),
        styles="\n".join(_asset(name) for name in STYLES),
        header=header_html(runs),
        summary=summary_html(runs),
        flags=flags_html({run.name: flags_of(run) for run in runs}, logged=any(len(run.train) for run in runs)),
        sections=sections_html(runs, evaluations),
        built=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        data=as_script_json(page_data(runs, detail, follow)),
        scripts="\n".join(f"<script>{_asset(name)}</script>" for name in SCRIPTS),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8").strip()


def as_script_json(data: Any) -> str:
    """JSON that cannot end the `<script>` it stands in, whatever its strings hold; U+2028 and 2029 would end a line."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(runs: list[Run], detail: float, follow: float) -> dict[str, Any]:
    points, cells = int(points_each(len(runs)) * detail), int(CELLS * detail / len(runs))
    drawn = [{"name": run.name, "marks": _marks(run), "heat": heat_maps_of(run, cells), **curves_of(run, points)} for run in runs]
    return {"follow": follow, "groups": GROUPS, "charts": _charts(runs, drawn), "runs": drawn}


def _charts(runs: list[Run], drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that some run has numbers for: the catalogue's first and in its order, then what it does not know."""
    names = dict.fromkeys(name for run in drawn for name in run["curves"])
    layered = {name for run in runs for name in per_layer_columns(run.train)}
    points = {name for run in drawn for name in run["points"]}
    known = [metric.key for metric in METRICS if metric.key in names or points & set(POINTS_IN.get(metric.key, ()))]
    others = sorted(set(names) - set(known)) + sorted(points - {name for shown in POINTS_IN.values() for name in shown})
    charts = []
    for name in [*known, *others]:
        own = [name] if name in points and name not in names else []
        extra = {"points": POINTS_IN.get(name, own), "smooth": name not in STEADY}
        charts.append({**asdict(describe(name, layers=name in layered)), **extra})
    return charts


def _marks(run: Run) -> list[dict[str, Any]]:
    """Evenly fewer where there are very many of a kind."""
    kinds: dict[str, list[Mark]] = {}
    for mark in run.marks:
        kinds.setdefault(mark.kind, []).append(mark)
    thinned = [mark for marks in kinds.values() for mark in marks[:: math.ceil(len(marks) / MARKS)]]
    return [{**asdict(mark), "text": mark.text[:200]} for mark in sorted(thinned, key=lambda mark: mark.step)]

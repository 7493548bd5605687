"""The parts of the page that are text: header, figures, flags, settings, differences, evaluations. Every string is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from launch.reporting.checks import Flag
from launch.reporting.differences import settings_in_short, settings_that_differ
from launch.reporting.evaluations import Evaluation, Generation
from launch.reporting.flags import CHECKS
from launch.reporting.read import Run
from launch.reporting.summary import figures_of, planned_steps, state_of

WORDS = {"bad": "Act now", "look": "Have a look", "note": "Good to know"}


def header_html(runs: list[Run], *, only_title: bool = False) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(run.name for run in runs)
    if only_title:
        return escape(title)
    if len(runs) > 1:
        return f'<header class="top"><h1>{escape(title)}</h1></header>'
    run = runs[0]
    kind, state = state_of(run)
    chip = f'<span class="chip {kind}">{escape(state)}</span>'
    settings = dict(settings_in_short(run))
    parts = [settings[k] for k in ("Model", "Precision") if k in settings]
    parts += [f"{settings['Ranks']} ranks" if settings["Ranks"] != "1" else "1 rank"] if "Ranks" in settings else []
    parts += [f"{k} {settings[k]}" for k in ("Expert parallel", "ZeRO stage") if k in settings]
    meta = f'<span class="meta">{escape(" · ".join(parts))}</span>'
    return f'<header class="top"><h1>{escape(title)}</h1>{chip}{meta}</header>'


def swatch(index: int) -> str:
    return f'<span class="swatch" data-run="{index}"></span>'


def summary_html(runs: list[Run]) -> str:
    """Tiles for one run, a table for several."""
    if len(runs) == 1:
        return _progress(runs[0]) + _tiles(runs[0])
    figures = [figures_of(run) for run in runs]
    heads = "".join(f'<th scope="col" class="n">{escape(figure.label)}</th>' for figure in figures[0])
    rows = []
    for index, (run, row) in enumerate(zip(runs, figures, strict=True)):
        kind, state = state_of(run)
        cells = "".join(f'<td class="n">{escape(figure.value)}</td>' for figure in row)
        name = f'<td class="name">{swatch(index)}{escape(run.name)} <span class="chip {kind}">{escape(state)}</span></td>'
        rows.append(f"<tr>{name}{cells}</tr>")
    return f'<div class="card scroll"><table class="data"><tr><th scope="col">Run</th>{heads}</tr>{"".join(rows)}</table></div>'


def _progress(run: Run) -> str:
    planned = planned_steps(run)
    share = min(1.0, run.last_step / planned) if planned else 0.0
    return f'<div class="progress"><i style="width:{share:.2%}"></i></div>' if 0 < share < 1 else ""


def _tiles(run: Run) -> str:
    tiles = [
        f'<div class="card tile"><div class="label">{escape(figure.label)}</div><div class="value">{escape(figure.value)}</div>'
        f'<div class="sub">{escape(figure.sub)}</div></div>'
        for figure in figures_of(run)
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def flags_html(flags: dict[str, list[Flag]], *, logged: bool = True) -> str:
    """`logged`: there is something that could raise one."""
    several = len(flags) > 1
    items = [_flag(flag, name if several else "") for name, found in flags.items() for flag in found]
    if items:
        return "\n".join(items)
    if not logged:
        return (
            '<div class="flag note"><b class="word">Nothing is logged yet.</b> A row comes with each --log_interval of steps.</div>'
        )
    return (
        f'<div class="flag good"><b class="word">No red flags.</b> {len(CHECKS)} checks: finite numbers, loss, gradient norm, '
        "clipping, validation, experts, router logits, speed, waiting for data, skipped steps, saves, the file itself.</div>"
    )


def _flag(flag: Flag, run: str) -> str:
    who = f' <span class="who">{escape(run)}:</span>' if run else ""
    return (
        f'<div class="flag {flag.level}"><b class="word">{WORDS[flag.level]}: {escape(flag.title)}.</b>{who} {escape(flag.detail)}'
        f'<div class="advice">{escape(flag.advice)}</div></div>'
    )


def sections_html(runs: list[Run], evaluations: dict[str, list[Evaluation]]) -> str:
    parts = [_evaluations(evaluations), _generations(evaluations), _differences(runs), _settings(runs)]
    return "\n".join(part for part in parts if part)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card scroll"><table class="data"><tr>{head}</tr>{body}</table></div>'


def _evaluations(evaluations: dict[str, list[Evaluation]]) -> str:
    rows = [(run, evaluation) for run, found in evaluations.items() for evaluation in found]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for _, evaluation in rows for name in evaluation.figures))
    names.sort(key=lambda name: (name.startswith("pass@"), int(name.split("@")[1]) if "@" in name else 0))
    heads = ["Run", "Evaluation", *(escape(name.replace("_", " ")) for name in names)]
    cells = [[escape(run) or "–", escape(e.name), *(_figure(name, e) for name in names)] for run, e in rows]
    return f'<h2>Evaluations of exported models</h2>\n<div id="evaluations">{_table(heads, cells)}</div>'


def _figure(name: str, evaluation: Evaluation) -> str:
    """A share in per cent, with its interval where there is one."""
    value, interval = evaluation.figures.get(name), evaluation.intervals.get(name)
    if value is None:
        return "–"
    if not name.startswith("pass@"):
        return f"{value:.4g}"
    return f"{value:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


def _generations(evaluations: dict[str, list[Evaluation]]) -> str:
    found = [(run, g) for run, items in evaluations.items() for evaluation in items for g in evaluation.generations]
    blocks = [_generation(run if len(evaluations) > 1 else "", g) for run, g in found]
    return "<h2>Generations</h2>\n" + "\n".join(blocks) if blocks else ""


def _generation(run: str, generation: Generation) -> str:
    words = {True: '<span class="chip good">passed</span>', False: '<span class="chip bad">failed</span>', None: ""}
    name = f"{escape(run)} · " if run else ""
    title = f"<summary>{name}{escape(generation.title)} {words[generation.passed]}</summary>"
    return f'<details class="card">{title}<pre>{escape(generation.text)}</pre></details>'


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _differences(runs: list[Run]) -> str:
    if len(runs) < 2:
        return ""
    known, without = [run for run in runs if run.config], [run.name for run in runs if not run.config]
    heads = [head for head, run in zip(_run_heads(runs), runs, strict=True) if run.config]
    said = f"<p>Without a config.json that can be read, and left out: {escape(', '.join(without))}.</p>" if without else ""
    rows = [[code(name), *(code(value) for value in values)] for name, values in settings_that_differ(known)]
    table = f'<div id="differences">{_table(["Setting", *heads], rows)}</div>' if rows else "<p>None.</p>"
    return f"<h2>Settings that differ</h2>\n{said}{table}"


def _run_heads(runs: list[Run]) -> list[str]:
    return [f"{swatch(index)}{escape(run.name)}" for index, run in enumerate(runs)]


def _settings(runs: list[Run]) -> str:
    """A list for one run, a table for several."""
    settings = [dict(settings_in_short(run)) for run in runs]
    names = list(dict.fromkeys(name for pairs in settings for name in pairs))
    if not names:
        return ""
    if len(runs) > 1:
        rows = [[escape(name), *(escape(pairs.get(name, "–")) for pairs in settings)] for name in names]
        return "<h2>Settings</h2>\n" + _table(["", *_run_heads(runs)], rows)
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(settings[0][name])}</dd></div>" for name in names)
    return f'<h2>Settings</h2>\n<div class="card"><dl class="settings">{items}</dl></div>'

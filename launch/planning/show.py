"""The answer in words and tables, 100 columns wide at most."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from launch.engine.kinds import shown
from launch.planning.ladder import in_words
from launch.planning.time import WAITS
from launch.words import BILLIONS, SECONDS_PER_DAY, duration, short

#: The parts of a rank's memory, in the order in which they are shown, and what each is.
PARTS = {
    "weights": "weights",
    "gathered": "gathered weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "buckets": "reduction buckets",
    "activations": "activations",
    "loss": "loss",
    "working": "backward of a block",
    "exchange": "all-to-all buffers",
    "step": "optimizer's step",
    "not_at_once": "never at the same time",
    "build": "building the model, beyond that",
    "runtime": "context, NCCL, allocator",
}


def show(answer: dict[str, Any], *, with_curve: bool) -> str:
    """All of it, sections apart by empty lines."""
    sections = [_head(answer), _memory(answer), _time(answer), _communication(answer), _alternatives(answer)]
    if with_curve:
        sections.append(_curve(answer))
    sections.append("\n".join(["assumptions", *(wrapped(f"  {line}") for line in answer["assumptions"])]))
    if "written" in answer:
        sections.append(f"wrote {answer['written']}: train with --deepspeed_config {shlex.quote(answer['written'])}")
    return "\n\n".join(sections)


def _head(answer: dict[str, Any]) -> str:
    parameters, batch, layout = answer["parameters"], answer["batch"], answer["layout"]
    total, active = (short(parameters[name], units=BILLIONS) for name in ("total", "active"))
    lines = [
        f"{answer['model']}: {total} parameters, {active} active for a token, {answer['flops_per_token'] / 1e9:.3g} GFLOP a token",
        f"{answer['gpus']} x {answer['gpu']}, {answer['deepspeed_config']}: EP {layout['expert_ranks']}, ZeRO "
        f"{layout['zero_stage']}, recomputation {layout['activation_checkpointing']}",
    ]
    lines += [f"warning: {doubt}" for doubt in answer["doubts"]]
    if answer["to_train"]:
        lines.append(f"this JSON does not train on {answer['gpus']} GPUs as it is; planned with {_changed(answer['to_train'])}")
    lines.append(
        f"a step: {batch['micro_batch']} sequences x {batch['accumulation']} micro-batches x {answer['gpus']} GPUs x "
        f"{answer['sequence_length']:,} tokens = {batch['tokens_per_step']:,} tokens"
    )
    return "\n".join(map(wrapped, lines))


def _changed(pairs: dict[str, Sequence[object]]) -> str:
    """Keys of the JSON, from what to what, to be pasted; `unset` is a key that is not there."""
    said = {key: ["unset" if value is None else shown(value) for value in pair] for key, pair in pairs.items()}
    return ", ".join(f"{key} from {old} to {new}" for key, (old, new) in said.items())


def _memory(answer: dict[str, Any]) -> str:
    memory, has = answer["memory_gb"], answer["device_memory_gb"]
    rows = [(title, f"{memory[part]:.2f}") for part, title in PARTS.items() if abs(memory[part]) >= 0.005]
    rows.append(("sum", f"{memory['total']:.2f}"))
    worst = answer["memory_gb_at_worst_load"]
    verdict = f"{'fits' if answer['fits'] else 'does not fit'}: {memory['total']:.1f} of {has:.1f} GB"
    if answer["fits"] and not answer["fits_at_worst_load"]:
        verdict += f", but not when routing sends a rank three times its share ({worst:.1f} GB)"
    elif worst > memory["total"]:
        verdict += f"; {worst:.1f} GB when routing sends a rank three times its share"
    if answer["to_fit"]:
        verdict += f"; to fit, change {_changed(answer['to_fit'])}"
    lines = ["memory of a GPU at its fullest, GB (10^9 bytes)", table(rows), wrapped(verdict)]
    if memory["build"] >= 0.005:
        lines.append("that is at the start, where each rank builds the whole model in fp32; training takes less at an even load")
    if memory["host"]:
        lines.append(f"and {memory['host']:.1f} GB of host memory for each GPU")
    return "\n".join(lines)


def _time(answer: dict[str, Any]) -> str:
    limits = ", ".join(f"{WAITS[name]} {share:.0%}" for name, share in answer["limits"].items() if share >= 0.01)
    lines = [
        f"{answer['seconds_per_step']:.3g} s a step, {answer['tokens_per_second']:,.0f} tokens/s, MFU {answer['mfu']:.1%}",
        f"it waits for: {limits}",
    ]
    if answer["days"] is not None:
        line = f"{answer['tokens']:.4g} tokens: {answer['steps']:,} steps, {duration(answer['days'] * SECONDS_PER_DAY)}, "
        line += f"{answer['gpu_hours']:,.0f} GPU hours, {answer['energy_kwh']:,.0f} kWh"
        lines.append(line + (f", cost {answer['cost']:,.0f}" if answer["cost"] is not None else ""))
        lines.append(f"train so long with --max_steps {answer['steps']}")
    if answer["expected"] is not None:
        lines += in_words(answer["expected"], tokens=answer["tokens"])
    return "\n".join(map(wrapped, lines))


def _communication(answer: dict[str, Any]) -> str:
    if not answer["communication"]:
        return "communication: none"
    head = ("communication of a step", "link", "GB sent", "messages", "ms")
    rows = [
        (t["kind"], t["link"], f"{t['gb']:.2f}", f"{t['messages']:,}", f"{t['seconds'] * 1e3:.1f}") for t in answer["communication"]
    ]
    return table([head, *rows])


def _alternatives(answer: dict[str, Any]) -> str:
    if not answer["alternatives"]:
        if answer["memory_gb"]["build"] >= 0.005:  # whatever their number, and the length of a sample
            return "no layout of this job fits safely, since each GPU builds the whole model: take larger ones or a smaller model"
        return "no layout of this job fits safely: take more GPUs, larger ones, or a shorter --sequence_length"
    head = ("fastest that fit safely", "EP", "ZeRO", "recompute", "micro-batch", "offload", "GB", "tokens/s", "MFU")
    rows = [
        (
            f"{number}",
            str(one["expert_ranks"]),
            str(one["zero_stage"]),
            one["activation_checkpointing"],
            f"{one['micro_batch']} x {one['accumulation']}",
            "yes" if one["offload_optimizer"] else "no",
            f"{one['memory_gb']:.1f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['mfu']:.1%}",
        )
        for number, one in enumerate(answer["alternatives"], 1)
    ]
    return table([head, *rows])


def _curve(answer: dict[str, Any]) -> str:
    head = ("GPUs", "EP", "micro-batch", "GB", "tokens/s", "a GPU", "MFU", "what breaks")
    rows = [
        (
            f"{point['gpus']}",
            str(point["expert_ranks"]),
            f"{point['micro_batch']} x {point['accumulation']}",
            f"{point['memory_gb']:.1f}",
            f"{point['tokens_per_second']:,.0f}",
            f"{point['tokens_per_second'] / point['gpus']:,.0f}",
            f"{point['mfu']:.1%}",
            point["breaks"] or "nothing",
        )
        for point in answer["curve"]
    ]
    return table([head, *rows])


def wrapped(line: str) -> str:
    """In lines of 100 columns at most; those that go on stand two columns further in. Paths stay whole."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they must be; the first and texts to the left, numbers to the right."""
    listed = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in listed) for column in range(len(listed[0]))]
    numeric = [all(_is_number(row[column]) for row in listed[-1:]) for column in range(len(widths))]
    lines = []
    for row in listed:
        cells = (
            cell.rjust(width) if right and number else cell.ljust(width)
            for number, (cell, width, right) in enumerate(zip(row, widths, numeric, strict=True))
        )
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").replace("%", "").isdigit()

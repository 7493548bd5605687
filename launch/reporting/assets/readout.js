// What a chart says in words: the values at the cursor, in its head and beside it, and the marks of what happened.
"use strict";
Report.markKinds = {
  checkpoint: { sign: "▲", title: "checkpoint", color: "--muted" },
  save_failed: { sign: "✕", title: "save failed", color: "--bad" },
  skipped: { sign: "╵", title: "skipped step", color: "--bad" },
  restart: { sign: "┆", title: "restart", color: "--run-5" },
  rollback: { sign: "┆", title: "rolled back", color: "--bad" },
};
Report.everywhere = new Set(["restart", "rollback"]); // the others only where they belong: loss and norm
Report.marksOn = (metric, kind) => Report.everywhere.has(kind) || metric.key === "loss" || (metric.key === "grad_norm" && kind === "skipped");

Report.drawMarks = (u, chart) => {
  const { ctx, bbox } = u, ratio = devicePixelRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  for (const index of Report.visible()) {
    const run = Report.data.runs[index];
    for (const mark of run.marks) {
      if (!Report.marksOn(chart.metric, mark.kind)) continue;
      const at = Report.convert(run, mark.step);
      const x = at === null ? NaN : u.valToPos(at, "x", true);
      if (x >= bbox.left - 1 && x <= bbox.left + bbox.width + 1) Report.drawMark(ctx, mark.kind, x, bbox, ratio);
    }
  }
  ctx.restore();
};

Report.drawMark = (ctx, kind, x, bbox, ratio) => {
  const bottom = bbox.top + bbox.height, size = 4 * ratio;
  ctx.strokeStyle = ctx.fillStyle = Report.color(Report.markKinds[kind].color);
  ctx.lineWidth = ratio;
  ctx.beginPath();
  if (Report.everywhere.has(kind)) {
    ctx.setLineDash([3 * ratio, 3 * ratio]);
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bottom);
    ctx.stroke();
    ctx.setLineDash([]);
  } else if (kind === "checkpoint") {
    ctx.moveTo(x - size, bottom);
    ctx.lineTo(x + size, bottom);
    ctx.lineTo(x, bottom - 1.7 * size);
    ctx.fill();
  } else if (kind === "skipped") {
    ctx.lineWidth = 1.5 * ratio;
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + 3 * size);
    ctx.stroke();
  } else {
    ctx.lineWidth = 2 * ratio;
    ctx.moveTo(x - size, bottom - 3 * size);
    ctx.lineTo(x + size, bottom - size);
    ctx.moveTo(x + size, bottom - 3 * size);
    ctx.lineTo(x - size, bottom - size);
    ctx.stroke();
  }
};

// Values at the cursor, or the last ones: one row a curve.
Report.valuesAt = (u, chart) => {
  const rows = [];
  chart.series.forEach(({ index, role, name, validation }, i) => {
    if (role !== "line" && role !== "dots") return;
    const column = u.data[i + 1];
    let at = u.cursor.idxs?.[i + 1] ?? null;
    if (at === null || column[at] === null || column[at] === undefined) at = column.findLastIndex((y) => y !== null && y !== undefined);
    if (at < 0) return;
    const [hi, lo] = role === "line" ? Report.bandAt(u, chart, index, at) : [null, null];
    rows.push({ index, name, validation, x: u.data[0][at], y: column[at], hi, lo });
  });
  return rows;
};

Report.bandAt = (u, chart, index, at) => {
  const column = (role) => chart.series.findIndex((s) => s.index === index && s.role === role);
  const hi = column("hi");
  return hi < 0 ? [null, null] : [u.data[hi + 1][at], u.data[column("lo") + 1][at]];
};

Report.rowColor = (row) => (row.validation && Report.data.runs.length === 1 ? Report.color("--run-1") : Report.runColor(row.index));

Report.readOut = (u, chart) => {
  const rows = Report.valuesAt(u, chart);
  chart.now.replaceChildren(...rows.slice(0, 4).map((row) => {
    const value = Report.element("span", {}, Report.format(row.y));
    value.style.color = Report.rowColor(row);
    return value;
  }));
  const inside = u.cursor.left >= 0 && u.over.matches(":hover");
  chart.tip.style.display = inside && rows.length ? "block" : "none";
  if (inside && rows.length) Report.fillTip(u, chart, rows);
};

Report.fillTip = (u, chart, rows) => {
  const { element } = Report, x = u.posToVal(u.cursor.left, "x");
  const several = Report.data.runs.length > 1;
  const body = rows.map((row) => {
    const swatch = element("span", { class: "swatch" });
    swatch.style.background = Report.rowColor(row);
    const title = [several ? Report.data.runs[row.index].name : "", row.name].filter(Boolean).join(", ") || chart.metric.title;
    const range = row.lo === null || row.lo === undefined || row.lo === row.hi ? "" : ` (${Report.format(row.lo)} to ${Report.format(row.hi)})`;
    return element("tr", {}, element("td", {}, swatch, title.length > 48 ? title.slice(0, 47) + "…" : title), element("td", { class: "v" }, Report.format(row.y, 5) + range));
  });
  const marks = Report.marksNear(u, chart).map((text) => element("div", { class: "mark" }, text));
  chart.tip.replaceChildren(element("div", { class: "at" }, Report.placeInWords(rows[0], x)), element("table", {}, element("tbody", {}, ...body)), ...marks);
  const width = chart.tip.offsetWidth, room = u.over.clientWidth;
  const left = u.cursor.left + 14 + width > room ? u.cursor.left - width - 14 : u.cursor.left + 14;
  chart.tip.style.left = `${Math.max(-40, left)}px`;
  chart.tip.style.top = `${Math.max(0, Math.min(u.cursor.top - 20, u.over.clientHeight - chart.tip.offsetHeight))}px`;
};

// The place in the chosen unit, and for one run in all three.
Report.placeInWords = (row, x) => {
  if (Report.data.runs.length > 1) return Report.units[Report.state.x](x);
  const { axis } = Report.data.runs[0];
  const at = axis[Report.state.x].indexOf(row.x);
  if (at < 0) return Report.units[Report.state.x](row.x);
  return ["step", "tokens", "hours"].filter((unit) => axis[unit][at] !== null && axis[unit][at] !== undefined)
    .map((unit) => Report.units[unit](axis[unit][at])).join(" · ");
};

Report.marksNear = (u, chart) => {
  const near = [];
  for (const index of Report.visible()) {
    for (const mark of Report.data.runs[index].marks) {
      const at = Report.marksOn(chart.metric, mark.kind) ? Report.convert(Report.data.runs[index], mark.step) : null;
      if (at !== null && Math.abs(u.valToPos(at, "x") - u.cursor.left) < 5) near.push(mark.text.slice(0, 90));
    }
  }
  return near.slice(0, 4);
};

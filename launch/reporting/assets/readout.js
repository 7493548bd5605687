// What a chart says in words: the values at the cursor, in its head and beside it, and the marks of what happened.
"use strict";
Report.markKinds = {
  checkpoint: { sign: "▲", title: "checkpoint", color: "--muted" },
  save_failed: { sign: "✕", title: "save failed", color: "--bad" },
  skipped: { sign: "╵", title: "skipped step", color: "--bad" },
  restart: { sign: "┆", title: "restart", color: "--ink" },
  rollback: { sign: "┆", title: "rolled back", color: "--bad" },
};
Report.everywhere = new Set(["restart", "rollback"]); // the others only where they belong: loss and norm
Report.marksOn = (metric, kind) => Report.everywhere.has(kind) || metric.key === "loss" || (metric.key === "grad_norm" && kind === "skipped");

Report.drawMarks = (u, chart) => {
  const { ctx, bbox } = u, ratio = devicePixelRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left - 5 * ratio, bbox.top, bbox.width + 10 * ratio, bbox.height); // a mark at the edge is drawn whole
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

// Values at the cursor, or the last ones: one row a curve, as measured, with what smoothing makes of it beside it.
Report.valuesAt = (u, chart) => {
  const rows = [];
  chart.series.forEach(({ index, role, name, validation }, i) => {
    if (role !== "line" && role !== "dots") return;
    const line = u.data[i + 1], thin = role === "line" ? Report.columnOf(u, chart, index, "raw") : null, column = thin ?? line;
    const at = u.cursor.idx === null || u.cursor.idx === undefined ? column.findLastIndex(Report.isNumber) : u.cursor.idxs[i + 1];
    if (!Report.isNumber(column[at])) return;
    const edge = (which) => (role === "line" ? Report.columnOf(u, chart, index, which)?.[at] : null);
    rows.push({ index, role, name, validation, x: u.data[0][at], y: column[at], smoothed: thin ? line[at] : null, hi: edge("hi"), lo: edge("lo") });
  });
  return rows;
};

Report.isNumber = (y) => y !== null && y !== undefined;
Report.columnOf = (u, chart, index, role) => {
  const found = chart.series.findIndex((series) => series.index === index && series.role === role);
  return found < 0 ? null : u.data[found + 1];
};

Report.rowColor = (row) => (row.validation && Report.data.runs.length === 1 ? Report.color("--run-1") : Report.runColor(row.index));

Report.readOut = (u, chart) => {
  const rows = Report.valuesAt(u, chart), heads = Report.headRows(rows);
  chart.now.replaceChildren(...heads.map((row) => {
    const value = Report.element("span", { title: Report.rowTitle(row, chart) }, Report.format(row.y));
    value.style.color = Report.rowColor(row);
    return value;
  }));
  chart.plot.setAttribute("aria-valuetext", rows.map((row) => `${Report.units[Report.state.x](row.x)}: ${Report.rowTitle(row, chart)} ${Report.format(row.y)}`).join("; "));
  const last = Math.max(0, u.data[0].length - 1);
  chart.plot.setAttribute("aria-valuemax", last);
  chart.plot.setAttribute("aria-valuenow", u.cursor.idx ?? last);
  const inside = u.cursor.left >= 0 && (u.over.matches(":hover") || chart.plot.matches(":focus-visible"));
  chart.tip.style.display = inside && rows.length ? "block" : "none";
  if (inside && rows.length) Report.fillTip(u, chart, rows);
};

// A head has no room for names: of several runs one value each, and of many none.
Report.headRows = (rows) => {
  if (Report.data.runs.length === 1) return rows.slice(0, 4);
  const firsts = rows.filter((row, i) => rows.findIndex(({ index }) => index === row.index) === i);
  return firsts.length > 4 ? [] : firsts;
};

Report.rowTitle = (row, chart) => {
  const run = Report.data.runs.length > 1 ? Report.names[row.index] : "";
  return [run, row.name].filter(Boolean).join(", ") || chart.metric.title;
};

Report.tipRow = (row, chart, x) => {
  const { element, format } = Report, swatch = element("span", { class: "swatch" });
  if (row.validation && Report.data.runs.length === 1) swatch.style.background = Report.rowColor(row);
  else Report.paintSwatch(swatch, row.index);
  const range = !Report.isNumber(row.lo) || row.lo === row.hi ? "" : ` (${format(row.lo)} to ${format(row.hi)})`;
  const smoothed = Report.isNumber(row.smoothed) ? `, smoothed ${format(row.smoothed)}` : "";
  const elsewhere = row.role === "dots" && row.x !== x ? ` (${Report.units[Report.state.x](row.x)})` : "";
  return element("tr", {}, element("td", {}, swatch, Report.rowTitle(row, chart) + elsewhere),
    element("td", { class: "v" }, format(row.y, 5), element("small", {}, range + smoothed)));
};

Report.mostRows = 8;
Report.fillTip = (u, chart, rows) => {
  const { element } = Report, x = u.data[0][u.cursor.idx];
  const off = (row) => Math.abs(u.valToPos(row.y, "y") - u.cursor.top);
  const near = new Set([...rows].sort((a, b) => off(a) - off(b)).slice(0, Report.mostRows)); // those that the mouse points at
  const body = rows.filter((row) => near.has(row)).map((row) => Report.tipRow(row, chart, x));
  const more = rows.length > near.size ? [element("div", { class: "mark" }, `and ${rows.length - near.size} further from the mouse`)] : [];
  const marks = Report.marksNear(u, chart).map((text) => element("div", { class: "mark" }, text));
  chart.tip.replaceChildren(element("div", { class: "at" }, Report.placeInWords(x)), element("table", {}, element("tbody", {}, ...body)), ...more, ...marks);
  const width = chart.tip.offsetWidth, offset = u.over.getBoundingClientRect().left;
  const left = u.cursor.left + 14 + width > u.over.clientWidth ? u.cursor.left - width - 14 : u.cursor.left + 14;
  chart.tip.style.left = `${Math.max(6 - offset, Math.min(left, document.documentElement.clientWidth - 6 - width - offset))}px`;
  chart.tip.style.top = `${Math.max(0, Math.min(u.cursor.top - 20, u.over.clientHeight - chart.tip.offsetHeight))}px`;
};

// The place in the chosen unit, and for one run in all three.
Report.placeInWords = (x) => {
  if (Report.data.runs.length > 1) return Report.units[Report.state.x](x);
  const { axis } = Report.data.runs[0];
  const at = axis[Report.state.x].indexOf(x);
  if (at < 0) return Report.units[Report.state.x](x);
  return ["step", "tokens", "hours"].filter((unit) => axis[unit][at] !== null && axis[unit][at] !== undefined)
    .map((unit) => Report.units[unit](axis[unit][at])).join(" · ");
};

Report.marksNear = (u, chart) => {
  const near = [];
  for (const index of Report.visible()) {
    for (const mark of Report.data.runs[index].marks) {
      const at = Report.marksOn(chart.metric, mark.kind) ? Report.convert(Report.data.runs[index], mark.step) : null;
      if (at !== null && Math.abs(u.valToPos(at, "x") - u.cursor.left) < 5) near.push((Report.data.runs.length > 1 ? `${Report.names[index]}: ` : "") + mark.text.slice(0, 90));
    }
  }
  return near.slice(0, 4);
};

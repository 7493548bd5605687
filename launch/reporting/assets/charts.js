// Line charts on uPlot: runs laid over each other, a band from least to greatest, smoothing, marks, one cursor for all.
"use strict";
Report.charts = [];
Report.sync = uPlot.sync("report");

// Exponential moving average that starts at the first value instead of at 0.
Report.smooth = (values, weight) => {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
};

Report.buildCharts = () => {
  const { element } = Report;
  const place = document.getElementById("charts");
  for (const group of Report.data.groups) {
    const grid = element("div", { class: "grid" });
    for (const metric of Report.data.charts.filter((m) => m.group === group)) grid.append(Report.buildChart(metric));
    if (grid.children.length) place.append(element("h2", {}, group), grid);
    if (group === "Learning") place.append(Report.markKey());
    if (group === "Experts") place.append(element("div", { id: "heat" }));
  }
};

Report.markKey = () => {
  const kinds = new Set(Report.data.runs.flatMap((run) => run.marks.map((mark) => mark.kind)));
  const shown = Object.entries(Report.markKinds).filter(([kind]) => kinds.has(kind));
  return Report.element("div", { class: "key" }, ...shown.map(([, kind]) => {
    const sign = Report.element("i", {}, kind.sign);
    sign.style.color = `var(${kind.color})`;
    return Report.element("span", {}, sign, ` ${kind.title}`);
  }));
};

Report.buildChart = (metric) => {
  const { element, state } = Report;
  const now = element("span", { class: "now" });
  const log = element("button", { type: "button", class: "log", title: "logarithmic axis" }, "log");
  const tip = element("div", { class: "tip" });
  const plot = element("div", { class: "plot" });
  const head = element("header", {}, element("h3", {}, metric.title), element("span", { class: "unit" }, metric.unit), now, log);
  const wide = metric.key === "loss";
  const card = element("section", { class: `card chart${wide ? " wide" : ""}`, "data-metric": metric.key }, head,
    element("div", { class: "help" }, metric.help), plot);
  const chart = { metric, now, tip, plot, wide, u: null, series: [] };
  const isLog = () => state.log[metric.key] ?? metric.log;
  log.addEventListener("click", () => { state.log[metric.key] = !isLog(); Report.keep(); draw(); });
  const draw = () => {
    log.setAttribute("aria-pressed", String(isLog()));
    chart.u?.destroy();
    Report.drawChart(chart, isLog());
  };
  Report.charts.push(chart);
  Report.drawers.push(draw);
  return card;
};

// One table (x, and columns) for each curve; uPlot aligns them. A series' `role` is band, raw, line or dots.
Report.tables = (chart, isLog) => {
  const { data, state } = Report, { key } = chart.metric;
  const tables = [], series = [];
  const positive = (values) => (isLog ? values.map((v) => (v > 0 ? v : null)) : values);
  for (const index of Report.visible()) {
    const run = data.runs[index], curve = run.curves[key];
    if (curve) {
      const keep = [], xs = [];
      run.axis[state.x].forEach((x, i) => {
        if (x !== null && curve.y[i] !== null && !(xs.length && x <= xs.at(-1))) { keep.push(i); xs.push(x); }
      });
      const pick = (values) => positive(keep.map((i) => values[i]));
      const raw = pick(curve.y), columns = [xs];
      if (curve.lo) { columns.push(pick(curve.hi), pick(curve.lo)); series.push({ index, role: "hi" }, { index, role: "lo" }); }
      if (state.smooth > 0 && chart.metric.smooth) { columns.push(raw); series.push({ index, role: "raw" }); }
      columns.push(state.smooth > 0 && chart.metric.smooth ? Report.smooth(raw, state.smooth) : raw);
      series.push({ index, role: "line", name: chart.metric.layers ? "median layer" : "" });
      tables.push(columns);
    }
    for (const name of chart.metric.points) {
      const points = run.points[name];
      if (!points) continue;
      const pairs = points.step.map((step, i) => [Report.convert(run, step), points.y[i]]).filter(([x]) => x !== null);
      tables.push([pairs.map(([x]) => x), positive(pairs.map(([, y]) => y))]);
      const validation = name.startsWith("val_");
      series.push({ index, role: "dots", validation, name: validation ? "validation" : "" });
    }
  }
  return { tables, series };
};

Report.drawChart = (chart, isLog) => {
  const { state, color } = Report;
  const { tables, series } = Report.tables(chart, isLog);
  chart.series = series;
  const data = tables.length ? uPlot.join(tables) : [[], []];
  const several = Report.data.runs.length > 1;
  const lines = series.map(({ index, role, validation }) => {
    const stroke = validation && !several ? color("--run-1") : Report.runColor(index);
    const quiet = { points: { show: false }, width: 0, stroke: "transparent" };
    if (role === "hi" || role === "lo") return quiet;
    if (role === "raw") return { points: { show: false }, width: 1, stroke, alpha: 0.28 };
    if (role === "dots") return { stroke, width: several ? 1 : 1.5, dash: several && validation ? [4, 4] : undefined, points: { show: true, size: 5, fill: color("--card") } };
    return { stroke, width: 1.75, points: { show: false } };
  });
  const bands = [];
  series.forEach(({ index, role }, i) => {
    if (role === "hi") bands.push({ series: [i + 1, i + 2], fill: Report.runColor(index) + "26" });
  });
  const axis = { stroke: color("--muted"), font: "11px system-ui, sans-serif", ticks: { stroke: color("--line"), size: 4 }, grid: { stroke: color("--grid"), width: 1 } };
  const options = {
    width: Math.max(200, chart.plot.clientWidth), height: chart.wide ? 300 : 190, padding: [8, 18, 0, 0],
    series: [{}, ...(lines.length ? lines : [{}])], bands,
    scales: {
      x: { time: false, range: () => Report.xRange() },
      y: { distr: isLog ? 3 : 1, range: Report.yRange(isLog) },
    },
    axes: [
      { ...axis, values: Report.ticks, incrs: state.x === "step" ? Report.wholeSteps : undefined, space: 60, size: 28 },
      { ...axis, values: Report.ticks, size: 54, space: 30 },
    ],
    cursor: { sync: { key: "report", scales: ["x", null] }, drag: { x: true, y: false, setScale: false }, points: { size: 7, fill: (u, i) => u.series[i].stroke(u, i), stroke: color("--card"), width: 1 }, y: false, dataIdx: Report.nearest },
    hooks: {
      draw: [(u) => Report.drawMarks(u, chart)],
      setCursor: [(u) => Report.readOut(u, chart)],
      setSelect: [(u) => Report.zoomTo(u)],
      ready: [(u) => u.over.addEventListener("mouseleave", () => { chart.tip.style.display = "none"; })],
    },
  };
  chart.u = new uPlot(options, data, chart.plot);
  chart.u.over.addEventListener("dblclick", () => { state.range = null; Report.redraw(); });
  chart.u.over.append(chart.tip);
  chart.tip.style.display = "none";
  Report.readOut(chart.u, chart);
};

// All charts over the same stretch: what the reader zoomed to, or all that any visible run has.
Report.xRange = () => {
  const { range, x } = Report.state;
  if (range) return range;
  let min = Infinity, max = -Infinity;
  for (const index of Report.visible()) {
    const run = Report.data.runs[index];
    const evaluated = Object.values(run.points).flatMap(({ step }) => [step[0], step.at(-1)].map((at) => Report.convert(run, at)));
    for (const at of [...run.axis[x].filter((value) => value !== null), ...evaluated]) {
      if (at === null || at === undefined) continue;
      min = Math.min(min, at);
      max = Math.max(max, at);
    }
  }
  if (min > max) return [0, 1];
  return min === max ? [min, min + 1] : [min, max];
};

// With as many digits as tell neighbours apart; no part of a step.
Report.ticks = (u, ticks) => {
  const shown = ticks.filter((tick) => tick !== null);
  const words = (digits) => ticks.map((tick) => (tick === null ? "" : Report.tick(tick, digits)));
  const enough = [3, 4, 5, 6].find((digits) => new Set(shown.map((tick) => Report.tick(tick, digits))).size === shown.length);
  return words(enough ?? 6);
};
Report.tick = (value, digits) => (Math.abs(value) >= 1e4 ? value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: digits }) : Report.format(value, digits));
Report.wholeSteps = [0, 1, 2, 3, 4, 5, 6, 7, 8].flatMap((power) => [1, 2, 5].map((n) => n * 10 ** power));

// What is visible, with a margin; without outliers where the reader asked for that.
Report.yRange = (isLog) => (u, min, max) => {
  if (min === null || max === null || !Number.isFinite(min)) return isLog ? [0.1, 10] : [0, 1];
  if (Report.state.clip) [min, max] = Report.quantiles(u) ?? [min, max];
  if (isLog) return uPlot.rangeLog(min, max, 10, false);
  if (max - min <= 1e-6 * Math.max(Math.abs(min), Math.abs(max))) { // a flat curve; smoothing leaves rounding, which is no shape
    const middle = (min + max) / 2;
    if (middle === 0) return [0, 0.1];
    [min, max] = [middle - Math.abs(middle) * 0.05, middle + Math.abs(middle) * 0.05];
  }
  const margin = (max - min) * 0.06;
  return [min >= 0 && min - margin < 0 ? 0 : min - margin, max + margin];
};

Report.quantiles = (u) => {
  const [low, high] = Report.state.range ?? [-Infinity, Infinity], values = [];
  u.data.slice(1).forEach((column, i) => {
    if (u.series[i + 1].width === 0) return; // the band's edges are the outliers
    column.forEach((y, j) => { if (y !== null && y !== undefined && u.data[0][j] >= low && u.data[0][j] <= high) values.push(y); });
  });
  values.sort((a, b) => a - b);
  return values.length > 20 ? [values[Math.floor(values.length * 0.01)], values[Math.ceil(values.length * 0.99) - 1]] : null;
};

Report.zoomTo = (u) => {
  if (u.select.width < 4) return;
  Report.state.range = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
  setTimeout(Report.redraw); // the charts are built anew, and this one is still busy
};

// The point of each series next to the cursor: runs do not log the same steps.
Report.nearest = (u, seriesIndex, at) => {
  const xs = u.data[0], ys = u.data[seriesIndex];
  if (!ys || (ys[at] !== null && ys[at] !== undefined)) return at;
  let left = at, right = at;
  while (left >= 0 && (ys[left] === null || ys[left] === undefined)) left -= 1;
  while (right < xs.length && (ys[right] === null || ys[right] === undefined)) right += 1;
  if (left < 0) return right < xs.length ? right : at;
  if (right >= xs.length) return left;
  return xs[at] - xs[left] <= xs[right] - xs[at] ? left : right;
};

// Line charts on uPlot: runs laid over each other, a band from least to greatest, smoothing, marks, one cursor for all.
"use strict";
Report.charts = [];
Report.sync = uPlot.sync("report");

// Exponential moving average that starts at the first value instead of at 0. `inLogs`: of logarithms, for what is read by its
// factors, so that one high value does not lift the curve for many steps. `leftOut` (indices) are passed over.
Report.smooth = (values, weight, inLogs = false, leftOut = new Set()) => {
  let sum = 0, norm = 0;
  return values.map((value, i) => {
    if (value === null || value === undefined) return value;
    if (!leftOut.has(i) && (value > 0 || !inLogs)) {
      sum = weight * sum + (1 - weight) * (inLogs ? Math.log(value) : value);
      norm = weight * norm + (1 - weight);
    }
    if (!norm) return null;
    return inLogs ? Math.exp(sum / norm) : sum / norm;
  });
};

Report.buildCharts = () => {
  const { element } = Report;
  const place = document.getElementById("charts");
  for (const group of Report.data.groups) {
    const grid = element("div", { class: "grid" });
    for (const metric of Report.data.charts.filter((m) => m.group === group)) grid.append(Report.buildChart(metric));
    if (grid.children.length) place.append(element("h2", {}, group), grid);
    if (group === "Learning") place.append(Report.markKey(), Report.caption());
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

// What else is only to be seen in the toolbar, which paper does not have.
Report.caption = () => {
  const caption = Report.element("div", { class: "key caption" }), { state } = Report;
  Report.drawers.push(() => {
    const over = { step: "steps", tokens: "tokens", hours: "hours of training" }[state.x];
    const smoothed = state.smooth ? ` Curves are smoothed (moving average, weight ${state.smooth}), thin ones as measured.` : "";
    caption.textContent = `From left to right: ${over}.${smoothed}`;
  });
  return caption;
};

Report.buildChart = (metric) => {
  const { element, state } = Report;
  const now = element("span", { class: "now" });
  const log = element("button", { type: "button", class: "log", title: "logarithmic axis", "aria-label": `logarithmic axis of ${metric.title}` }, "log");
  const tip = element("div", { class: "tip" });
  const plot = element("div", { class: "plot", role: "slider", tabindex: "0", "aria-label": metric.title, "aria-valuemin": 0 });
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
  plot.addEventListener("keydown", (event) => Report.moveCursor(event, chart));
  plot.addEventListener("mousedown", (event) => event.preventDefault()); // a click gives no focus, whose loss moves other cursors
  plot.addEventListener("blur", () => chart.u.setCursor({ left: -10, top: -10 }, true, true));
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
      const raw = pick(curve.y), columns = [xs], leftOut = new Set(run.skipped.map((i) => keep.indexOf(i)));
      if (curve.lo) { columns.push(pick(curve.hi), pick(curve.lo)); series.push({ index, role: "hi" }, { index, role: "lo" }); }
      if (state.smooth > 0 && chart.metric.smooth) { columns.push(raw); series.push({ index, role: "raw" }); }
      columns.push(state.smooth > 0 && chart.metric.smooth ? Report.smooth(raw, state.smooth, isLog || chart.metric.log, leftOut) : raw);
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
  chart.spans = Report.data.runs.map(Report.span);
  const data = tables.length ? uPlot.join(tables) : [[], []];
  const several = Report.data.runs.length > 1;
  const lines = series.map(({ index, role, validation }, i) => {
    const stroke = validation && !several ? color("--run-1") : Report.runColor(index);
    const few = data[i + 1].filter((y) => y !== null && y !== undefined).length < 2; // no line between them to be seen
    const quiet = { points: { show: false }, width: 0, stroke: "transparent" };
    if (role === "hi" || role === "lo") return quiet;
    if (role === "raw") return { points: { show: false }, width: 1, stroke, alpha: 0.28 };
    if (role === "dots") return { stroke, width: several ? 1 : 1.5, dash: several && validation ? [4, 4] : undefined, points: { show: true, size: 5, fill: color("--card") } };
    return { stroke, width: 1.75, dash: Report.runDash(index), points: { show: few, size: 5 } };
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
      { ...axis, ...(isLog ? Report.logAxis : { values: Report.ticks }), size: Report.axisSize, space: 30 },
    ],
    cursor: { sync: { key: "report", scales: ["x", null] }, drag: { x: true, y: false, setScale: false }, points: { size: 7, fill: (u, i) => u.series[i].stroke(u, i), stroke: color("--card"), width: 1 }, y: false, dataIdx: Report.nearest(chart) },
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

Report.zoomTo = (u) => {
  if (u.select.width < 4) return;
  Report.state.range = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
  setTimeout(Report.redraw); // the charts are built anew, and this one is still busy
};

// The point of each series next to the cursor, for runs do not log the same steps; none where the run has not begun or has ended.
Report.nearest = (chart) => (u, seriesIndex, at) => {
  const xs = u.data[0], ys = u.data[seriesIndex];
  if (!ys || (ys[at] !== null && ys[at] !== undefined) || !chart.series.length) return at;
  const { index } = chart.series[seriesIndex - 1], [from, to] = chart.spans[index];
  const between = (to - from) / Math.max(1, Report.data.runs[index].axis.step.length - 1); // its neighbours' first and last steps need not be its own
  if (xs[at] < from - between || xs[at] > to + between) return at;
  let left = at, right = at;
  while (left >= 0 && (ys[left] === null || ys[left] === undefined)) left -= 1;
  while (right < xs.length && (ys[right] === null || ys[right] === undefined)) right += 1;
  if (left < 0) return right < xs.length ? right : at;
  if (right >= xs.length) return left;
  return xs[at] - xs[left] <= xs[right] - xs[at] ? left : right;
};

// Arrow keys go from point to point, Home and End to the first and the last.
Report.moveCursor = (event, { u }) => {
  const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
  if (!(event.key in steps) || !u.data[0].length) return;
  event.preventDefault();
  const [first, last] = u.series[0].idxs, at = u.cursor.idx ?? (steps[event.key] > 0 ? first - 1 : last + 1);
  const next = Math.min(last, Math.max(first, at + steps[event.key]));
  u.setCursor({ left: u.valToPos(u.data[0][next], "x"), top: u.over.clientHeight / 2 }, true, true); // true: hooks, and the other charts
};

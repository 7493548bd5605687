// Heat maps on a canvas: layers (or every layer's experts) from top to bottom, steps from left to right.
"use strict";
Report.heatTitles = {
  expert_load: "Load of every expert over its fair share", max_vio: "Load imbalance (max_vio)", max_vio_window: "Load imbalance over a window",
  load_entropy: "Entropy of the load", unused_experts: "Unused experts", bias_range: "Range of the balancing bias",
  router_logit_rms: "Size of the router's logits", attention_sink_mass: "Attention on the sink",
};
// Stops from nothing to much; expert load is two-sided around 1, and of entropy little is bad.
Report.ramps = {
  light: { one: ["#f4f4f0", "#f6d98b", "#ea8a3a", "#b8322a", "#5d0f2b"], two: ["#2b5fb0", "#9fc0e6", "#f4f4f0", "#f0a884", "#b22f2a"] },
  dark: { one: ["#202329", "#5b3f77", "#b84a6a", "#ef8a4b", "#fbe27c"], two: ["#6aa5f5", "#33527c", "#22252a", "#8d4a35", "#ff8f6b"] },
};

Report.ramp = (stops) => {
  const parsed = stops.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return (share) => {
    const place = Math.min(1, Math.max(0, share)) * (parsed.length - 1), low = Math.min(parsed.length - 2, Math.floor(place));
    return parsed[low].map((from, i) => Math.round(from + (parsed[low + 1][i] - from) * (place - low)));
  };
};

Report.buildHeatMaps = () => {
  const { data, state, element } = Report;
  const names = Object.keys(Report.heatTitles).filter((name) => data.runs.some((run) => run.heat[name]));
  const place = document.getElementById("heat");
  if (!names.length) return;
  if (!names.includes(state.heat)) state.heat = names.includes("max_vio") ? "max_vio" : names[0];
  const select = element("select", { "aria-label": "what the heat map shows" }, ...names.map((name) => element("option", { value: name }, Report.heatTitles[name])));
  select.value = state.heat;
  select.addEventListener("change", () => { state.heat = select.value; Report.redraw(); });
  const maps = element("div", { class: "grid" });
  place.append(element("div", { class: "heat-head" }, element("h2", {}, "Heat map"), select), maps);
  Report.drawers.push(() => {
    const shown = Report.visible().filter((index) => data.runs[index].heat[state.heat]);
    maps.replaceChildren(...shown.map((index) => Report.heatCard(index, shown.length === 1)));
    for (const card of maps.children) card.paint();
  });
};

Report.decode = (map) => (map.cells ??= Uint8Array.from(atob(map.data), (c) => c.charCodeAt(0)));
Report.cellValue = (map, row, column) => {
  const byte = Report.decode(map)[row * map.columns + column];
  return byte === 255 ? null : map.lo + ((map.hi - map.lo) * byte) / 254;
};

// All runs of the page share a scale, so that a color means the same in each. Returns value -> share of the ramp, and its ends.
Report.heatScale = (name) => {
  const maps = Report.data.runs.map((run) => run.heat[name]).filter(Boolean);
  const lo = Math.min(...maps.map((map) => map.lo)), hi = Math.max(...maps.map((map) => map.hi));
  if (name === "expert_load") return { two: true, ends: ["0", `${Report.format(Math.max(2, hi), 3)} ×`], note: "the middle color is the fair share, 1", share: (v) => (v <= 1 ? v / 2 : 0.5 + (v - 1) / (2 * (Math.max(2, hi) - 1))) };
  if (name === "load_entropy") return { two: false, ends: ["1", Report.format(Math.min(lo, 0.5), 3)], note: "1 is even", share: (v) => (1 - v) / (1 - Math.min(lo, 0.5)) };
  const from = Math.min(0, lo), to = { unused_experts: Math.max(hi, 0.25), max_vio: Math.max(hi, 1.5), max_vio_window: Math.max(hi, 1.5) }[name] ?? (hi || 1);
  return { two: false, ends: [Report.format(from, 3), Report.format(to, 3)], note: "", share: (v) => (v - from) / (to - from || 1) };
};

Report.heatCard = (index, alone) => {
  const { element, state } = Report;
  const run = Report.data.runs[index], map = run.heat[state.heat], layers = map.layers ?? map.rows;
  const scale = Report.heatScale(state.heat), ramp = Report.ramp(Report.ramps[document.documentElement.dataset.theme][scale.two ? "two" : "one"]);
  const label = `${Report.heatTitles[state.heat]}, ${run.name}`;
  const canvas = element("canvas", { "data-heat": state.heat, tabindex: "0", role: "img", "aria-label": label }), bar = element("canvas", { width: 160, height: 1 }), tip = element("div", { class: "tip" });
  const title = Report.data.runs.length > 1 ? run.name : Report.heatTitles[state.heat];
  const height = Math.max(110, Math.min(420, map.experts ? map.rows * 5 : layers * 16));
  const card = element("section", { class: `card chart heat${alone ? " wide" : ""}` }, element("header", {}, element("h3", {}, title),
    element("span", { class: "unit" }, map.experts ? `${layers} layers of ${map.experts} experts${map.merged > 1 ? `, least and greatest of each ${map.merged}` : ""}` : `${layers} layers, the first on top`)),
    element("div", { class: "plot" }, canvas, tip), element("div", { class: "scale" }, scale.ends[0], bar, scale.ends[1], scale.note));
  card.paint = () => {
    const pixels = bar.getContext("2d").createImageData(160, 1);
    for (let i = 0; i < 160; i += 1) pixels.data.set([...ramp(i / 159), 255], 4 * i);
    bar.getContext("2d").putImageData(pixels, 0, 0);
    Report.paintHeat(canvas, run, map, layers, height, (value) => ramp(scale.share(value)));
  };
  canvas.addEventListener("mousemove", (event) => Report.heatTip(event, canvas, tip, map));
  for (const leave of ["mouseleave", "blur"]) canvas.addEventListener(leave, () => { tip.style.display = "none"; });
  canvas.addEventListener("keydown", (event) => {
    if (Report.moveInHeat(event, canvas, tip, map)) canvas.setAttribute("aria-label", `${label}: ${tip.innerText}`);
  });
  return card;
};

Report.paintHeat = (canvas, run, map, layers, height, colorOf) => {
  const { state } = Report, ratio = devicePixelRatio, width = canvas.parentElement.clientWidth, left = 54, bottom = 22;
  canvas.width = width * ratio;
  canvas.height = height * ratio + bottom * ratio;
  canvas.style.height = `${height + bottom}px`;
  const ctx = canvas.getContext("2d");
  ctx.scale(ratio, ratio);
  ctx.imageSmoothingEnabled = false;
  const xs = map.steps.map((step) => Report.convert(run, step)).map((x) => x ?? NaN);
  const [from, to] = Report.state.range ?? [Math.max(0, xs.length > 1 ? 2 * xs[0] - xs[1] : 0), xs.at(-1)];
  const place = (x) => left + ((width - left - 12) * (x - from)) / (to - from || 1);
  const source = Report.heatPicture(map, colorOf);
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, 0, width - left - 12, height);
  ctx.clip();
  canvas.columns = [];
  for (let column = 0; column < map.columns; column += 1) {
    const a = column ? place(xs[column - 1]) : Math.min(left, place(xs[0])), b = place(xs[column]);
    canvas.columns.push([a, b]);
    if (b > left && a < width) ctx.drawImage(source, column, 0, 1, map.rows, a, 0, Math.max(0.5, b - a + 0.4), height);
  }
  ctx.restore();
  canvas.box = { left, height, rows: map.rows };
  ctx.fillStyle = Report.color("--muted");
  ctx.font = "11px system-ui, sans-serif";
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  const every = Math.max(1, Math.ceil((layers * 15) / height));
  for (let layer = 0; layer < layers; layer += every) ctx.fillText(layer ? String(layer) : "layer 0", left - 7, ((layer + 0.5) * height) / layers);
  ctx.textBaseline = "alphabetic";
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    ctx.textAlign = share === 0 ? "left" : share === 1 ? "right" : "center";
    const x = from + (to - from) * share;
    ctx.fillText(Report.format(state.x === "hours" ? x : Math.round(x), 3), left + (width - left - 12) * share, height + 15);
  }
};

Report.heatPicture = (map, colorOf) => {
  const canvas = document.createElement("canvas");
  canvas.width = map.columns;
  canvas.height = map.rows;
  const pixels = canvas.getContext("2d").createImageData(map.columns, map.rows);
  for (let row = 0; row < map.rows; row += 1) {
    for (let column = 0; column < map.columns; column += 1) {
      const value = Report.cellValue(map, row, column);
      if (value !== null) pixels.data.set([...colorOf(value), 255], 4 * (row * map.columns + column));
    }
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
};

Report.heatTip = (event, canvas, tip, map) => {
  const { left, height, rows } = canvas.box;
  const x = event.offsetX, row = Math.floor((event.offsetY / height) * rows);
  const column = canvas.columns.findIndex(([a, b]) => x >= a && x < b);
  const inside = x >= left && row >= 0 && row < rows && column >= 0;
  tip.style.display = inside ? "block" : "none";
  if (!inside) return;
  const value = Report.cellValue(map, row, column), { experts } = map;
  const where = experts ? Report.expertsOf(map, row) : `layer ${row}`;
  const text = value === null ? "nothing" : Report.format(value, 3) + (experts ? " × its fair share" : "");
  tip.replaceChildren(Report.element("div", { class: "at" }, `${where}, step ${map.steps[column].toLocaleString("en")}`), Report.element("b", {}, text));
  tip.style.left = `${x + 14 + tip.offsetWidth > canvas.clientWidth ? x - tip.offsetWidth - 14 : x + 14}px`;
  tip.style.top = `${Math.max(0, event.offsetY - 18)}px`;
};

// Two rows of a layer stand for each so many experts where these are merged: the least and the greatest load.
Report.expertsOf = (map, row) => {
  const rows = map.rows / map.layers, layer = `layer ${Math.floor(row / rows)}`, at = row % rows;
  if (map.merged === 1) return `${layer}, expert ${at}`;
  const first = Math.floor(at / 2) * map.merged, last = Math.min(first + map.merged, map.experts) - 1;
  return `${layer}, experts ${first} to ${last}, the ${at % 2 ? "greatest" : "least"}`;
};

// Arrow keys go from cell to cell, from the last column on.
Report.moveInHeat = (event, canvas, tip, map) => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!move) return false;
  event.preventDefault();
  const within = (at, count) => Math.min(count - 1, Math.max(0, at));
  const column = within((canvas.at?.column ?? map.columns) + move[0], map.columns), row = within((canvas.at?.row ?? 0) + move[1], map.rows);
  const [from, to] = canvas.columns[column], { height, rows } = canvas.box;
  canvas.at = { row, column };
  Report.heatTip({ offsetX: (from + to) / 2, offsetY: ((row + 0.5) * height) / rows }, canvas, tip, map);
  return true;
};

Report.start();

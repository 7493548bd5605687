// What the reader chose (axis, smoothing, zoom, which runs), kept over a reload, and the theme. Charts and heat maps redraw from it.
"use strict";
const Report = { data: JSON.parse(document.getElementById("data").textContent), drawers: [] };

Report.state = { x: "step", smooth: 0.6, clip: false, hidden: [], range: null, log: {}, theme: "auto", heat: "" };
Report.key = "report:" + location.pathname;
try {
  Object.assign(Report.state, JSON.parse(sessionStorage.getItem(Report.key) || "{}"));
} catch { /* a page opened from disk may have no storage */ }

Report.keep = () => {
  try {
    sessionStorage.setItem(Report.key, JSON.stringify(Report.state));
  } catch { /* then a reload forgets the choices */ }
};

Report.color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
Report.runColor = (index) => Report.color(`--run-${index % 8}`);
Report.visible = () => Report.data.runs.map((_, index) => index).filter((index) => !Report.state.hidden.includes(index));

// Text is always set as text, never as HTML: names of runs may hold anything.
Report.element = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};

Report.format = (value, digits = 4) => {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e5) return value.toLocaleString("en", { notation: "compact", maximumFractionDigits: digits > 3 ? 2 : 1 });
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  if (size !== 0 && size < 1e-3) return value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(digits)));
};

Report.units = {
  step: (x) => `step ${Math.round(x).toLocaleString("en")}`,
  tokens: (x) => `${Report.format(x)} tokens`,
  hours: (x) => `${x < 1 ? Report.format(x * 60, 3) + " min" : Report.format(x) + " h"}`,
};

// Steps to the chosen axis, by the run's own table; between its points in proportion.
Report.convert = (run, step) => {
  const { axis } = run;
  if (Report.state.x === "step") return step;
  const to = axis[Report.state.x], from = axis.step;
  if (!from.length) return null;
  let high = from.findIndex((value) => value >= step);
  if (high < 0) high = from.length - 1;
  const [x0, y0] = high > 0 ? [from[high - 1], to[high - 1]] : [0, 0];
  if (to[high] === null || y0 === null) return null;
  return from[high] === x0 ? to[high] : y0 + ((to[high] - y0) * (step - x0)) / (from[high] - x0);
};

Report.applyTheme = (theme = Report.state.theme) => {
  const dark = theme === "dark" || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
};

Report.redraw = () => {
  Report.keep();
  for (const draw of Report.drawers) draw();
};

// ---------------------------------------------------------------------------------------------------------------- toolbar

Report.segments = (name, choices, choose) => {
  const buttons = choices.map(([value, title]) =>
    Report.element("button", { type: "button", "data-value": value, onclick: () => choose(value) }, title));
  const show = () => buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.value === Report.state[name])));
  Report.drawers.push(show);
  return Report.element("span", { class: "segments", role: "group", "aria-label": name }, ...buttons);
};

Report.buildToolbar = () => {
  const { element, state } = Report;
  const bar = document.getElementById("toolbar");
  const axes = ["step", "tokens", "hours"].filter((x) => Report.data.runs.some((run) => run.axis[x].some((value) => value !== null)));
  const smooth = element("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: state.smooth, id: "smooth" });
  smooth.addEventListener("input", () => { state.smooth = Number(smooth.value); Report.redraw(); });
  const clip = element("input", { type: "checkbox", id: "clip" });
  clip.checked = state.clip;
  clip.addEventListener("change", () => { state.clip = clip.checked; Report.redraw(); });
  const zoom = (from) => { state.range = from === null ? null : Report.part(from); Report.redraw(); };
  bar.append(
    element("span", { class: "group" }, "Over", Report.segments("x", axes.map((x) => [x, x]), (x) => {
      state.x = x; state.range = null; Report.redraw();
    })),
    element("label", {}, "Smoothing", smooth),
    element("label", { class: "wide-only" }, clip, "Ignore outliers"),
    element("span", { class: "group" },
      element("button", { type: "button", id: "reset", onclick: () => zoom(null) }, "All"),
      element("button", { type: "button", onclick: () => zoom(0.5) }, "Last half"),
      element("button", { type: "button", onclick: () => zoom(0.9) }, "Last tenth")),
  );
  if (Report.data.runs.length > 1) bar.append(Report.runButtons());
  bar.append(element("span", { class: "space" }), Report.segments("theme", [["light", "Light"], ["auto", "Auto"], ["dark", "Dark"]], (t) => {
    state.theme = t; Report.applyTheme(); Report.redraw();
  }));
};

Report.runButtons = () => {
  const { element, state } = Report;
  const buttons = Report.data.runs.map((run, index) => {
    const swatch = element("span", { class: "swatch" });
    const button = element("button", { type: "button", title: "show or hide" }, swatch, run.name);
    button.addEventListener("click", () => {
      state.hidden = state.hidden.includes(index) ? state.hidden.filter((i) => i !== index) : [...state.hidden, index];
      Report.redraw();
    });
    Report.drawers.push(() => {
      swatch.style.background = Report.runColor(index);
      button.setAttribute("aria-pressed", String(!state.hidden.includes(index)));
    });
    return button;
  });
  return element("span", { class: "runs" }, ...buttons);
};

// The last `1 - from` of the longest visible run.
Report.part = (from) => {
  const ends = Report.visible().map((index) => Report.data.runs[index].axis[Report.state.x].filter((x) => x !== null).at(-1) ?? 0);
  const end = Math.max(0, ...ends);
  return end ? [end * from, end] : null;
};

// ---------------------------------------------------------------------------------------------------------------- start

Report.start = () => {
  const root = document.documentElement;
  Report.applyTheme();
  if (Report.data.charts.length) Report.buildToolbar();
  else document.getElementById("toolbar").hidden = true;
  Report.buildCharts();
  Report.buildHeatMaps();
  Report.redraw();
  for (const swatch of document.querySelectorAll(".swatch[data-run]")) swatch.style.background = `var(--run-${swatch.dataset.run % 8})`;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { Report.applyTheme(); Report.redraw(); });
  let width = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar comes and goes
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(Report.redraw, 120);
  });
  // Paper is white and narrow; charts have the width they are drawn at, so they are drawn anew for it.
  addEventListener("beforeprint", () => { root.dataset.paper = "true"; Report.applyTheme("light"); Report.redraw(); });
  addEventListener("afterprint", () => { delete root.dataset.paper; Report.applyTheme(); Report.redraw(); });
  if (Report.data.follow) setTimeout(() => location.reload(), Report.data.follow * 1000);
  document.documentElement.dataset.ready = "true";
};

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
// Runs whose colors some eyes take for each other's (0 and 5, 1 and 4, 3 and 7, 4 and 6) or that share one have other dashes.
Report.dashes = [undefined, [9, 3], [2, 3], [9, 3, 2, 3], [16, 4], [2, 6]];
Report.runDash = (index) => Report.dashes[([0, 0, 0, 0, 1, 1, 2, 2][index % 8] + 3 * Math.floor(index / 8)) % 6];
Report.paintSwatch = (swatch, index) => {
  let at = 0;
  const stops = (Report.runDash(index) ?? [1, 0]).map((length, i) => `${i % 2 ? "transparent" : `var(--run-${index % 8})`} ${at}px ${at += length}px`);
  swatch.style.background = `repeating-linear-gradient(90deg, ${stops.join(", ")})`;
  swatch.classList.toggle("line", Report.data.runs.length > 1);
};

// Names in short: without what all of them begin with, and of a long one both ends, for there the names of runs differ.
Report.shortNames = (names, most = 32) => {
  if (names.every((name) => name.length <= most)) return names;
  const [first] = names;
  let same = 0;
  while (same < first.length && names.every((name) => name[same] === first[same])) same += 1;
  const begin = names.length > 1 ? first.slice(0, same).search(/[^/_\s-]*$/) : 0; // whole words
  return names.map((name) => name.slice(begin)).map((name) => (name.length > most ? `${name.slice(0, most / 2 - 1)}…${name.slice(-most / 2)}` : name));
};
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

Report.exponential = 1e15; // from here on numbers are written 1.2e17
Report.format = (value, digits = 4) => {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= Report.exponential) return value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e").replace("+", "");
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
    const button = element("button", { type: "button", title: `show or hide ${run.name}` }, swatch, Report.names[index]);
    button.addEventListener("click", () => {
      state.hidden = state.hidden.includes(index) ? state.hidden.filter((i) => i !== index) : [...state.hidden, index];
      Report.redraw();
    });
    Report.drawers.push(() => {
      Report.paintSwatch(swatch, index);
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

// What a page that loads itself would lose: the opened generations, and where the keyboard is.
Report.focusable = () => [...document.querySelectorAll("button, input, select, summary, [tabindex]")];
Report.keepPlace = () => {
  const open = [...document.querySelectorAll("details[open] summary")].map((summary) => summary.textContent);
  Report.state.place = { open, focus: Report.focusable().indexOf(document.activeElement) };
  Report.keep();
};
Report.restorePlace = () => {
  const { open, focus } = Report.state.place ?? { open: [], focus: -1 };
  for (const summary of document.querySelectorAll("details summary")) summary.parentElement.open ||= open.includes(summary.textContent);
  Report.focusable()[focus]?.focus({ preventScroll: true });
  delete Report.state.place;
  Report.keep();
};

// ---------------------------------------------------------------------------------------------------------------- start

Report.start = () => {
  const root = document.documentElement;
  Report.names = Report.shortNames(Report.data.runs.map((run) => run.name));
  Report.applyTheme();
  if (Report.data.charts.length) Report.buildToolbar();
  else document.getElementById("toolbar").hidden = true;
  Report.buildCharts();
  Report.buildHeatMaps();
  Report.redraw();
  for (const swatch of document.querySelectorAll(".swatch[data-run]")) Report.paintSwatch(swatch, Number(swatch.dataset.run));
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
  Report.restorePlace();
  if (Report.data.follow) setTimeout(() => { Report.keepPlace(); location.reload(); }, Report.data.follow * 1000);
  document.documentElement.dataset.ready = "true";
};

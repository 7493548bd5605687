// The stretch of steps and of values that charts show, and what is written at their axes.
"use strict";
// Where a run begins and ends on the chosen axis: [Infinity, -Infinity] of one without numbers.
Report.span = (run) => {
  const evaluated = Object.values(run.points).flatMap(({ step }) => [step[0], step.at(-1)].map((at) => Report.convert(run, at)));
  const known = [...run.axis[Report.state.x], ...evaluated].filter((at) => at !== null && at !== undefined);
  return [Math.min(...known), Math.max(...known)];
};

// All charts over the same stretch: what the reader zoomed to, or all that any visible run has.
Report.xRange = () => {
  if (Report.state.range) return Report.state.range;
  const spans = Report.visible().map((index) => Report.span(Report.data.runs[index]));
  const min = Math.min(...spans.map(([from]) => from)), max = Math.max(...spans.map(([, to]) => to));
  if (min > max) return [0, 1];
  return min === max ? [min, min + 1] : [min, max];
};

// With as many digits as tell neighbours apart; no part of a step.
Report.ticks = (u, ticks) => {
  const shown = ticks.filter((tick) => tick !== null);
  const large = shown.some((tick) => Math.abs(tick) >= 1e4); // then 5K beside 10K, and not 5,000
  const words = (digits) => shown.map((tick) => Report.tick(tick, digits, large));
  const enough = [3, 4, 5, 6].find((digits) => new Set(words(digits)).size === shown.length) ?? 6;
  return ticks.map((tick) => (tick === null ? "" : Report.tick(tick, enough, large)));
};
Report.tick = (value, digits, large) => {
  const size = Math.abs(value);
  if (!large || size < 1e3 || size >= Report.exponential) return Report.format(value, digits);
  return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: digits });
};
// Grid of a log axis, also over hundreds of decades, where uPlot has none: their ninths where they are few, of very many every n-th.
Report.logSplits = (u, axis, min, max) => {
  const low = Math.floor(Math.log10(min)), high = Math.ceil(Math.log10(max)), every = Math.ceil((high - low) / 20), splits = [];
  for (let power = low; power <= high; power += every) {
    for (const n of high - low < 9 ? [1, 2, 3, 4, 5, 6, 7, 8, 9] : [1]) splits.push(Number(`${n}e${power}`));
  }
  return splits.filter((split) => split >= min && split <= max);
};
// Some six of the decades; of fewer than two, what begins with 1, 2 or 5.
Report.logTicks = (u, ticks) => {
  const starts = (digits) => ticks.filter((tick) => digits.test(tick.toExponential()));
  const found = [/^1e/, /^[125]e/].map(starts).find((some) => some.length > 1) ?? ticks;
  const every = Math.ceil(found.length / 6), shown = found.filter((_, i) => i % every === 0), words = Report.ticks(u, shown);
  return ticks.map((tick) => words[shown.indexOf(tick)] ?? "");
};
Report.logAxis = { values: Report.logTicks, splits: Report.logSplits, filter: (_, splits) => splits, incrs: [Number.MAX_VALUE] };
// As wide as the longest label needs.
Report.axisSize = (u, labels) => Math.max(54, 7 * Math.max(0, ...(labels ?? []).map((label) => label?.length ?? 0)) + 14);
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

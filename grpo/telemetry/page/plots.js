/* The grid of plots. All plots share one cursor and one range of the x axis (`state.zoom`). */

const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [12, 5]];
const HEIGHT = 190, LARGE = 420, FEW = 12;
const STEP_TICKS = [0, 1, 2, 3, 4, 5, 6].flatMap(power => [1, 2, 5].map(first => first * 10 ** power));
const TIME_TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, ...[1, 2, 5, 10, 20, 30].map(n => n * 60), ...[1, 2, 5, 10, 20, 50, 100].map(n => n * 3600)];
const cells = [];

/** A CSS variable of the current color mode. */
function look(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function colorOf(place) {
  return look(`--curve-${place % 8}`);
}

/** A color between two colors, for scales from low to high. */
function shade(part) {
  const [from, to] = [look("--little"), look("--much")].map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));
  return `rgb(${from.map((value, i) => Math.round(value + part * (to[i] - value))).join(",")})`;
}

/** The color of a part of a stack on a scale; tasks without a solve rate are not on the scale. */
function shadeOf(series, place) {
  const rated = series.filter(([metric]) => !metric.endsWith("/unseen"));
  return place < rated.length ? shade(rated.length > 1 ? place / (rated.length - 1) : 1) : look("--unknown");
}

function faded(color) {
  const [r, g, b] = [1, 3, 5].map(i => parseInt(color.slice(i, i + 2), 16));
  return `rgba(${r},${g},${b},0.3)`;
}

/** The x values of a run's steps, on the selected axis. */
function alongAxis(run, steps) {
  if (state.axis === "step") return steps;
  const clock = clockOf(run.x, run.metrics.step_time || run.x.map(() => 0), run.every);
  return steps.map(clock);
}

/** The full range of the x axis, the same for all plots. */
function fullRange() {
  const ends = shownRuns().flatMap(([run]) => {
    const steps = [...run.x, ...(run.evaluations ? run.evaluations.x : [])];
    return alongAxis(run, steps);
  });
  let [low, high] = [Math.min(...extremes(ends)), Math.max(...extremes(ends))];
  if (!ends.length) [low, high] = [0, 1];
  return low === high ? [low - 1, high + 1] : [low, high];
}

function extremes(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/**
 * The curves of a plot: {run, label, color, dash, x, values, low, high}. With one run, each metric has a color; with
 * several runs, each run has a color and each metric a dash pattern.
 */
function curvesOf(plot) {
  const several = state.data.runs.length > 1, curves = [];
  for (const [run, place] of shownRuns()) {
    if (plot.run !== null && plot.run !== place) continue;
    plot.series.forEach(([metric, label], i) => {
      const own = plot.kind === "interval" ? evaluationOf(run, metric) : { x: run.x, values: run.metrics[metric] };
      if (!own || !own.values || own.values.every(value => value === null)) return;
      const parts = several && plot.kind !== "stack" ? [run.name, ...(plot.series.length > 1 ? [label] : [])] : [label];
      const byRun = several && plot.kind !== "stack";
      curves.push({
        ...own, run, label: parts.join(" · "), metric,
        color: plot.shades ? shadeOf(plot.series, i) : colorOf(byRun ? place : i),
        dash: DASHES[byRun ? i % DASHES.length : 0],
        x: alongAxis(run, own.x),
      });
    });
  }
  return curves;
}

function evaluationOf(run, metric) {
  const known = run.evaluations && run.evaluations.values[metric];
  return known ? { x: run.evaluations.x, values: known.value, low: known.low, high: known.high } : null;
}

/** One plot of the page: a permanent frame, and a drawing that is created again when its appearance changes. */
class Cell {
  constructor(plot) {
    this.plot = plot;
    this.log = null; // null: as in the toolbar
    this.title = el("h3", {}, this.heading());
    this.logButton = el("button", { type: "button", "aria-pressed": "false", title: "Logarithmic y axis", onclick: () => this.toggleLog() }, "log");
    this.sizeButton = el("button", { type: "button", "aria-pressed": "false", title: "Larger", onclick: () => this.toggleSize() }, "⤢");
    this.sizeButton.setAttribute("aria-label", "Larger");
    this.holder = el("div", { class: "holder", tabindex: "0", role: "img", onkeydown: event => this.onKey(event) });
    this.legend = el("ul", { class: "legend" });
    this.where = el("li", { class: "where" });
    const tools = plot.kind === "stack" ? [this.sizeButton] : [this.logButton, this.sizeButton];
    this.node = el("figure", { class: "cell" }, el("figcaption", {}, el("div", {}, this.title, el("p", { class: "about" }, plot.about)), el("div", { class: "tools" }, ...tools)), this.holder, this.legend);
    this.hidden = new Set();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.holder);
  }

  heading() {
    const { plot } = this;
    const of = plot.run !== null && state.data.runs.length > 1 ? ` · ${state.data.runs[plot.run].name}` : "";
    return plot.title + of;
  }

  draw() {
    if (this.chart) this.chart.destroy();
    this.chart = null;
    this.curves = curvesOf(this.plot);
    this.node.hidden = this.curves.length === 0;
    if (this.node.hidden || !this.holder.clientWidth) return;
    const { data, series, bands } = this.table();
    this.chart = new uPlot(this.options(series, bands), data, this.holder);
    this.drawLegend();
    this.holder.setAttribute("aria-label", this.summary());
    this.logButton.setAttribute("aria-pressed", String(this.isLog()));
  }

  /** Show new data. If the curves are the same, the drawing stays, and so do the cursor and the focus. */
  renew() {
    const before = this.chart && this.shape();
    this.curves = curvesOf(this.plot);
    if (!before || before !== this.shape()) {
      this.draw();
      return;
    }
    this.chart.setData(this.table().data);
    this.tellValues();
    this.holder.setAttribute("aria-label", this.summary());
  }

  shape() {
    return JSON.stringify([this.isLog(), this.curves.map(curve => [curve.label, this.hasPoints(curve)])]);
  }

  hasPoints(curve) {
    return curve.values.filter(value => value !== null).length <= FEW;
  }

  isLog() {
    if (this.plot.kind === "stack") return false;
    const wanted = this.log ?? state.log;
    const values = this.curves.flatMap(curve => curve.values);
    return wanted && values.some(value => value > 0) && values.every(value => value === null || value >= 0);
  }

  /** uPlot's table of columns, and how each column is drawn. The first are the x values. */
  table() {
    const tables = [], series = [{}], bands = [];
    const put = (curve, values, options) => {
      tables.push([curve.x, this.isLog() ? positive(values) : values]);
      series.push({ label: curve.label, show: !this.hidden.has(curve.label), spanGaps: true, ...options });
      return series.length - 1;
    };
    const points = curve => ({ show: this.hasPoints(curve), size: 5, fill: curve.color });
    if (this.plot.kind === "stack") this.putStack(put);
    else {
      for (const curve of this.curves) {
        const main = { stroke: curve.color, width: 1.75, dash: curve.dash, points: points(curve) };
        if (this.plot.kind === "interval") {
          const edge = { stroke: "transparent", width: 0, points: { show: false } };
          const high = put(curve, curve.high, edge), low = put(curve, curve.low, edge);
          bands.push({ series: [high, low], fill: faded(curve.color) });
          curve.column = put(curve, curve.values, main);
        } else if (state.smoothing > 0) {
          put(curve, curve.values, { stroke: faded(curve.color), width: 1, points: { show: false } });
          curve.column = put(curve, smooth(curve.values, state.smoothing), main);
        } else curve.column = put(curve, curve.values, main);
      }
    }
    return { data: tables.length ? uPlot.join(tables) : [[]], series, bands };
  }

  /** Stacked sums are drawn from the top down: each area covers the lower part of the previous one. */
  putStack(put) {
    const sums = stacked(this.curves.map(curve => curve.values));
    for (let i = this.curves.length - 1; i >= 0; i -= 1) {
      const curve = this.curves[i];
      curve.column = put(curve, sums[i], { stroke: look("--panel"), fill: curve.color, width: 0.5, points: { show: false } });
    }
  }

  options(series, bands) {
    const stack = this.plot.kind === "stack", ink = look("--faint"), grid = look("--grid");
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1, size: 4 }, font: "12px system-ui, sans-serif" };
    return {
      width: this.holder.clientWidth,
      height: this.node.classList.contains("large") ? LARGE : HEIGHT,
      legend: { show: false },
      series, bands,
      scales: {
        x: { time: false, range: () => state.zoom || fullRange() },
        y: { distr: this.isLog() ? 3 : 1, ...(this.isLog() ? {} : { range: (_, low, high) => yRange(low, high, stack) }) },
      },
      axes: [
        { ...axis, size: 26, gap: 3, incrs: state.axis === "step" ? STEP_TICKS : TIME_TICKS, values: (_, ticks) => ticks.map(tick => (state.axis === "step" ? tick.toLocaleString("en-US") : formatSeconds(tick))) },
        { ...axis, size: 54, gap: 3, values: (_, ticks) => ticks.map(tick => (tick === null ? null : formatNumber(tick))) },
      ],
      cursor: { y: false, sync: { key: "grpo", setSeries: false, scales: ["x", null] }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
      hooks: {
        setSelect: [chart => {
          const { left, width } = chart.select;
          if (width > 2) zoomTo([chart.posToVal(left, "x"), chart.posToVal(left + width, "x")]);
          chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        }],
        setCursor: [() => this.tellValues()],
        draw: [chart => this.markAlarms(chart)],
        ready: [chart => chart.over.addEventListener("dblclick", () => zoomTo(null))],
      },
    };
  }

  /** A dotted line at each step with an alarm. */
  markAlarms(chart) {
    const { ctx, bbox } = chart;
    ctx.save();
    ctx.strokeStyle = look("--bad");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([2 * devicePixelRatio, 4 * devicePixelRatio]);
    for (const run of new Set(this.curves.map(curve => curve.run))) {
      for (const x of alongAxis(run, run.alarms.map(([step]) => step))) {
        const left = chart.valToPos(x, "x", true);
        if (left < bbox.left || left > bbox.left + bbox.width) continue;
        ctx.beginPath();
        ctx.moveTo(left, bbox.top);
        ctx.lineTo(left, bbox.top + bbox.height);
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  drawLegend() {
    const ordered = this.plot.kind === "stack" ? [...this.curves].reverse() : this.curves;
    this.values = new Map();
    this.legend.replaceChildren(this.where, ...ordered.map(curve => {
      const value = el("span", { class: "value" });
      this.values.set(curve.label, value);
      const swatch = el("span", { class: this.plot.kind === "stack" ? "swatch block" : "swatch" });
      swatch.style.setProperty("--swatch", curve.color);
      if (curve.dash.length) swatch.classList.add("dashed");
      const off = this.hidden.has(curve.label);
      return el("li", {}, el("button", { type: "button", "aria-pressed": String(!off), onclick: () => this.toggle(curve.label) }, swatch, el("span", { class: "name" }, curve.label), value));
    }));
    this.tellValues();
  }

  /** The values at the cursor, or the last values if the cursor is not over a plot. */
  tellValues() {
    if (!this.chart || !this.values) return;
    const at = this.chart.cursor.idx, x = this.chart.data[0];
    const place = at ?? x.length - 1;
    const here = x[place];
    this.where.textContent = at === null || at === undefined ? "last" : state.axis === "step" ? `step ${here.toLocaleString("en-US")}` : `after ${formatSeconds(here)}`;
    for (const curve of this.curves) {
      const node = this.values.get(curve.label);
      let i = curve.x.length - 1;
      while (i > 0 && curve.x[i] > here) i -= 1;
      const value = valueBefore(curve.values, i);
      node.textContent = curve.low ? formatInterval(value, valueBefore(curve.low, i), valueBefore(curve.high, i)) : formatNumber(value);
    }
  }

  summary() {
    const told = this.curves.map(curve => {
      const known = curve.values.filter(value => value !== null);
      return `${curve.label} from ${formatNumber(known[0])} to ${formatNumber(known[known.length - 1])}`;
    });
    return `${this.heading()}: ${told.join("; ")}`;
  }

  toggle(label) {
    if (!this.hidden.delete(label)) this.hidden.add(label);
    this.draw();
    const again = [...this.legend.querySelectorAll("button")].find(button => button.querySelector(".name").textContent === label);
    if (again) again.focus();
  }

  toggleLog() {
    this.log = !(this.log ?? state.log);
    this.draw();
  }

  toggleSize() {
    const large = this.node.classList.toggle("large");
    this.sizeButton.setAttribute("aria-pressed", String(large));
    this.draw();
  }

  resize() {
    const width = this.holder.clientWidth;
    if (!width) return;
    if (!this.chart) this.draw();
    else if (this.chart.width !== width) this.chart.setSize({ width, height: this.chart.height });
  }

  onKey(event) {
    if (!this.chart || event.ctrlKey || event.metaKey || event.altKey) return;
    const x = this.chart.data[0], now = this.chart.cursor.idx ?? x.length - 1;
    const [low, high] = state.zoom || fullRange(), middle = x[now] ?? (low + high) / 2;
    const zoomed = factor => zoomTo([middle - (middle - low) * factor, middle + (high - middle) * factor]);
    const moves = {
      ArrowLeft: () => this.moveTo(Math.max(0, now - (event.shiftKey ? 10 : 1))),
      ArrowRight: () => this.moveTo(Math.min(x.length - 1, now + (event.shiftKey ? 10 : 1))),
      Home: () => this.moveTo(0),
      End: () => this.moveTo(x.length - 1),
      "+": () => zoomed(0.5),
      "=": () => zoomed(0.5),
      "-": () => zoomed(2),
      0: () => zoomTo(null),
      Escape: () => zoomTo(null),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
  }

  moveTo(place) {
    const { chart } = this;
    chart.setCursor({ left: chart.valToPos(chart.data[0][place], "x"), top: chart.over.clientHeight / 2 }, true, true);
  }
}

/** The range of a linear y axis, with space around a constant value. */
function yRange(low, high, stack) {
  if (low === null || high === null) return [0, 1];
  if (stack) return [0, high > 0 ? high * 1.02 : 1];
  if (low === high) return low === 0 ? [-0.05, 1] : [low - Math.abs(low) / 10, low + Math.abs(low) / 10];
  return uPlot.rangeNum(low, high, 0.1, true);
}

/** Show a range of the x axis in all plots; null: the full range. */
function zoomTo(range) {
  const [low, high] = fullRange();
  if (range) range = [Math.max(low, range[0]), Math.min(high, range[1])];
  state.zoom = range && range[1] > range[0] && (range[0] > low || range[1] < high) ? range : null;
  for (const cell of cells) {
    if (cell.chart) cell.chart.setData(cell.chart.data, true);
  }
  showRange();
}

function drawPlots() {
  for (const cell of cells) cell.draw();
}

/** The plots of the data under their headings, then a small plot for each other metric. */
function buildPlots(root) {
  for (const cell of cells.splice(0)) {
    cell.observer.disconnect();
    if (cell.chart) cell.chart.destroy();
  }
  const used = new Set(state.data.plots.flatMap(plot => plot.series.map(([metric]) => metric)));
  const more = [...new Set(state.data.runs.flatMap(run => Object.keys(run.metrics)))].filter(metric => !used.has(metric)).sort();
  const rest = more.map(metric => ({ section: "All other metrics", title: metric, about: "", kind: "lines", series: [[metric, metric]], shades: false, run: null }));
  const grids = new Map();
  for (const plot of [...state.data.plots, ...rest]) {
    if (!grids.has(plot.section)) grids.set(plot.section, el("div", { class: "grid" }));
    const cell = new Cell(plot);
    cells.push(cell);
    grids.get(plot.section).append(cell.node);
  }
  root.replaceChildren(...[...grids].map(([name, grid]) => section(name, grid, rest.length > 0 && name === "All other metrics")));
  drawPlots();
}

/** A section of the page that can be collapsed. The section of other metrics starts collapsed, with a search field. */
function section(name, grid, closed) {
  const parts = [el("summary", {}, el("h2", {}, name))];
  if (closed) {
    const find = el("input", { type: "search", placeholder: "part of a name", oninput: () => {
      for (const cell of cells.filter(one => one.plot.section === name)) {
        cell.node.classList.toggle("unwanted", !cell.plot.title.includes(find.value.trim()));
      }
    } });
    parts.push(el("label", { class: "find" }, "Find a metric ", find));
  }
  return el("details", { class: "section", id: `section-${name.toLowerCase().replace(/\W+/g, "-")}`, ...(closed ? {} : { open: "" }) }, ...parts, grid);
}

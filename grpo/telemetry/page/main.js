/* Everything around the plots and the completions: header, cards, tables, toolbar, and updates of the data. */

/** An element. Strings become text nodes, never HTML, because the output of models is untrusted. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

const at = id => document.getElementById(id);
const state = { data: JSON.parse(at("data").textContent), off: new Set(), smoothing: 0, log: false, axis: "step", zoom: null };

/** The selected runs, with their indices, which determine the colors. */
function shownRuns() {
  return state.data.runs.map((run, place) => [run, place]).filter(([run]) => !state.off.has(run.name));
}

/** Replace the children of a node; sections that the user opened or closed stay that way. */
function redraw(root, nodes) {
  const open = new Map([...root.querySelectorAll("details[id]")].map(part => [part.id, part.open]));
  const focused = root.contains(document.activeElement) && document.activeElement.closest("details[id]");
  root.replaceChildren(...nodes);
  for (const part of root.querySelectorAll("details[id]")) part.open = open.get(part.id) ?? part.open;
  if (focused && at(focused.id)) at(focused.id).querySelector("summary").focus();
}

function swatch(place) {
  const node = el("span", { class: "swatch block" });
  node.style.setProperty("--swatch", `var(--curve-${place % 8})`);
  return node;
}

/* ---- Header and toolbar ---- */

function drawHeader() {
  at("title").textContent = state.data.title;
  document.title = state.data.title;
  const links = [["Summary", "summary"], ...[...document.querySelectorAll("details.section")].map(part => [part.querySelector("h2").textContent, part.id]), ["Completion browser", "completions"]];
  const drawn = JSON.stringify([links, state.data.runs.map(run => run.name)]);
  if (at("links").dataset.drawn === drawn) return; // the focus may be here
  at("links").dataset.drawn = drawn;
  at("links").replaceChildren(...links.map(([text, id]) => el("a", { href: `#${id}` }, text)));
  const several = state.data.runs.length > 1;
  at("runs").hidden = !several;
  at("runs").replaceChildren(...state.data.runs.map((run, place) => el("button", { type: "button", class: "run", "aria-pressed": String(!state.off.has(run.name)), onclick: event => toggleRun(run.name, event.currentTarget) }, swatch(place), run.name)));
}

function toggleRun(name, button) {
  if (!state.off.delete(name)) state.off.add(name);
  button.setAttribute("aria-pressed", String(!state.off.has(name)));
  drawSummary();
  drawTables();
  drawPlots();
  browser.refresh();
}

function showRange() {
  const [low, high] = state.zoom || fullRange();
  const rounded = value => String(state.axis === "step" ? Math.round(value) : Number(value.toPrecision(4)));
  at("from").value = rounded(low);
  at("to").value = rounded(high);
  at("reset").disabled = state.zoom === null;
}

function connectToolbar() {
  at("smoothing").addEventListener("input", event => {
    state.smoothing = Number(event.target.value);
    at("smoothed").textContent = state.smoothing.toFixed(2).replace(/^0\.00$/, "0");
    drawPlots();
  });
  at("log").addEventListener("change", event => {
    state.log = event.target.checked;
    for (const cell of cells) cell.log = null;
    drawPlots();
  });
  at("axis").addEventListener("change", event => {
    state.axis = event.target.value;
    state.zoom = null;
    drawPlots();
    showRange();
  });
  for (const id of ["from", "to"]) at(id).addEventListener("change", () => zoomTo([Number(at("from").value), Number(at("to").value)]));
  at("reset").addEventListener("click", () => zoomTo(null));
  at("theme").addEventListener("change", event => setTheme(event.target.value));
  at("print").addEventListener("click", () => window.print());
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPlots);
  let closed = [], theme = "auto";
  window.addEventListener("beforeprint", () => { // for print: light colors, and every section expanded except the other metrics
    theme = at("theme").value;
    closed = [...document.querySelectorAll("details.setup:not([open])")];
    for (const part of closed) part.open = true;
    setTheme("light");
  });
  window.addEventListener("afterprint", () => {
    for (const part of closed) part.open = false;
    setTheme(theme);
  });
}

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  drawPlots();
}

/* ---- Cards ---- */

function drawSummary() {
  redraw(at("summary"), shownRuns().map(([run, place]) => {
    const cards = [...changeCards(run), timeCard(run), memoryCard(run), phaseCard(run), failureCard(run)];
    const setup = el("details", { class: "setup", id: `setup-${place}` }, el("summary", {}, "Main settings"), el("dl", {}, ...run.settings.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)])));
    const head = el("header", {}, state.data.runs.length > 1 ? swatch(place) : null, el("h2", {}, run.name), el("span", { class: `state ${run.state}` }, run.state), el("span", { class: "faint" }, `step ${run.step.toLocaleString("en-US")} of ${run.steps.toLocaleString("en-US")}${run.now ? `, ${run.now}` : ""}`));
    return el("article", { class: "run" }, head, alarmsOf(run), el("div", { class: "cards" }, ...cards.filter(Boolean)), setup);
  }));
}

/** The newest alarms first; the table has all of them. */
function alarmsOf(run) {
  if (!run.alarms.length) return null;
  const told = run.alarms.slice(-3).reverse().map(([step, kind, what]) => el("li", {}, el("b", {}, `${kind} at step ${step.toLocaleString("en-US")}`), `: ${what}`));
  const more = run.alarms.length - told.length;
  const all = el("li", {}, el("a", { href: "#section-what-went-wrong" }, more ? `${more} more, and what to do` : "what to do"));
  return el("ul", { class: "alarms", "aria-label": "Alarms" }, ...told, all);
}

function card(title, big, ...small) {
  return el("div", { class: "card" }, el("h3", {}, title), el("p", { class: "big" }, ...[big].flat()), ...small.filter(Boolean).map(text => el("p", { class: "small" }, ...[text].flat())));
}

function arrow() {
  return el("span", { class: "arrow", "aria-label": "to" }, " → ");
}

/** Before and after: greedy decoding, the mean over samples, and the reward in training. */
function changeCards(run) {
  const known = run.cards.evaluations, wanted = known.filter(one => one.name === "greedy" || one.name.startsWith("avg@"));
  const cards = (wanted.length ? wanted : known.slice(0, 1)).map(one => {
    const { before, after } = one, interval = it => formatInterval(it.value, it.low, it.high);
    const big = before ? [formatMeasure(before.value), arrow(), formatMeasure(after.value)] : formatMeasure(after.value);
    const lines = before ? [`step ${before.step}: ${interval(before)}`, `step ${after.step}: ${interval(after)}`] : [`step ${after.step}: ${interval(after)}`];
    return card(`${one.name}, held out`, big, ...lines, `${one.n} prompts, 95 % intervals`);
  });
  const reward = run.cards.reward;
  if (reward) {
    const steps = reward.steps === 1 ? "the first and the last step" : `means of the first and the last ${reward.steps} steps`;
    cards.push(card("Reward in training", [formatMeasure(reward.before), arrow(), formatMeasure(reward.after)], steps));
  }
  return cards;
}

function timeCard(run) {
  const steps = run.metrics.step_time ? run.cards.steps : 0;
  if (!steps) return null;
  const { seconds, tokens } = run.cards;
  return card("Time", formatSeconds(seconds), `${formatSeconds(seconds / steps)} per step`, tokens ? `${formatNumber(tokens)} tokens sampled` : null);
}

function memoryCard(run) {
  const peak = run.cards.peak_memory;
  return peak === null ? null : card("Peak memory", `${formatNumber(peak)} GB`, "highest since the run started");
}

/** The phases as one bar, and as text with their shares. */
function phaseCard(run) {
  const total = run.phases.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (!total) return null;
  const parts = run.phases.filter(([, seconds]) => seconds / total >= 0.0005);
  const bar = el("div", { class: "bar", "aria-hidden": "true" }, ...parts.map(([name, seconds]) => {
    const part = el("span");
    part.style.width = `${(100 * seconds) / total}%`;
    part.style.background = `var(--curve-${phasePlace(run, name)})`;
    return part;
  }));
  const list = el("ul", {}, ...parts.map(([name, seconds]) => {
    const block = swatch(phasePlace(run, name));
    const share = (100 * seconds) / total;
    return el("li", {}, block, `${name} ${share < 1 ? "<1" : Math.round(share)} %`);
  }));
  return el("div", { class: "card phases" }, el("h3", {}, "Cost by phase"), bar, list);
}

/** The color of a phase in the plot of times. */
function phasePlace(run, name) {
  const series = state.data.plots.filter(plot => plot.run === state.data.runs.indexOf(run)).flatMap(plot => plot.series.map(([metric], i) => [metric, i]));
  return (series.find(([metric]) => metric === `time/${name}`)?.[1] ?? 0) % 8;
}

function failureCard(run) {
  const { failures, silent, replayed } = run.cards;
  const lines = [silent ? `${formatNumber(silent)} steps without a signal` : null, replayed ? `${formatNumber(replayed)} older groups replayed` : null];
  if (!failures && !silent && !replayed) return null;
  return card("Failures of rewards", formatNumber(failures), ...lines);
}

/* ---- Tables ---- */

function drawTables() {
  const runs = shownRuns().map(([run]) => run), several = state.data.runs.length > 1;
  const first = several ? ["run"] : [];
  const named = (run, cells) => (several ? [run.name, ...cells] : cells);
  const interval = it => (it ? formatInterval(it.value, it.low, it.high) : "");
  const evaluations = runs.flatMap(run => run.cards.evaluations.map(one => named(run, [one.name, interval(one.before), interval(one.after), String(one.n), run.evaluations.grader])));
  const headings = [...new Set(runs.flatMap(run => run.failures.headings))];
  const failures = runs.flatMap(run => run.failures.rows.map(row => named(run, headings.map(heading => row[run.failures.headings.indexOf(heading)] ?? ""))));
  const alarms = runs.flatMap(run => run.alarms.map(([step, ...told]) => named(run, [String(step), ...told])));
  redraw(at("tables"), [
    ...(alarms.length ? [tableSection("What went wrong", [...first, "step", "alarm", "what happened", "what to do"], alarms, "")] : []),
    tableSection("Evaluation table", [...first, "metric", "first", "last", "prompts", "graded by"], evaluations, "There is no evaluation yet: the recipe has no section eval, or the run has not reached one."),
    tableSection("Reward failures", [...first, ...headings], failures, "There is no reward yet."),
  ]);
}

function tableSection(title, headings, rows, none) {
  const body = rows.length
    ? el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, el("table", {}, el("thead", {}, el("tr", {}, ...headings.map(text => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows.map(row => el("tr", {}, ...row.map(text => el("td", {}, text)))))))
    : el("p", { class: "faint" }, none);
  const id = `section-${title.toLowerCase().replace(/\W+/g, "-")}`;
  return el("details", { class: "section", open: "", id }, el("summary", {}, el("h2", {}, title)), body);
}

/* ---- New data ---- */

/** Replace the data; the user's selections stay. */
function takeData(fresh) {
  const old = state.data;
  state.data = updated(old, fresh);
  drawSummary();
  drawTables();
  if (JSON.stringify(old.plots) === JSON.stringify(fresh.plots) && sameMetrics(old, state.data)) for (const cell of cells) cell.renew();
  else buildPlots(at("plots"));
  drawHeader();
  if (!at("toolbar").contains(document.activeElement)) showRange();
  if (!sameCompletions(old, state.data)) browser.refresh();
}

function sameCompletions(old, fresh) {
  const counts = data => data.runs.map(run => [run.name, run.completions && [run.completions.total, run.completions.rows.length]]);
  return JSON.stringify(counts(old)) === JSON.stringify(counts(fresh));
}

function sameMetrics(old, fresh) {
  const names = data => data.runs.map(run => [run.name, Object.keys(run.metrics)]);
  return JSON.stringify(names(old)) === JSON.stringify(names(fresh));
}

/** Fetch the data repeatedly while a run is running. */
async function follow(address, seconds) {
  const line = at("live");
  line.hidden = false;
  for (;;) {
    try {
      const answer = await fetch(address, { cache: "no-store" });
      if (!answer.ok) throw new Error((await answer.text()).trim() || `status ${answer.status}`);
      takeData(await answer.json());
      line.textContent = `Live: as of ${new Date().toLocaleTimeString("en-US")}`;
    } catch (error) {
      line.textContent = `Not live: cannot read ${address} (${error.message}). The page shows the last data that it read.`;
    }
    if (!state.data.runs.some(run => run.state === "running")) {
      line.textContent = "Not live: all runs have ended. The page shows their final state.";
      return;
    }
    await new Promise(done => setTimeout(done, 1000 * seconds));
  }
}

/* ---- Begin ---- */

const browser = new Browser(at("completions"));
connectToolbar();
drawSummary();
drawTables();
buildPlots(at("plots"));
drawHeader();
showRange();
browser.refresh();
const { live, seconds } = document.documentElement.dataset;
if (live) follow(live, Number(seconds));

/* The browser for completions: filters, a list, and one completion with its tokens, its turns, and its prompt over time. */

const PAGE = 100;
const MOST_COMPARED = 200;

/** A select of texts; `all` is the label of the option without a filter. */
function choice(label, all, change) {
  const select = el("select", { onchange: change });
  return { select, all, node: el("label", {}, `${label} `, select) };
}

function fill({ select, all }, values) {
  const now = select.value;
  select.replaceChildren(el("option", { value: "" }, all), ...values.map(([value, text]) => el("option", { value }, text)));
  select.value = values.some(([value]) => value === now) ? now : "";
}

class Browser {
  constructor(root) {
    this.root = root;
    this.shown = PAGE;
    this.task = "";
    this.color = "surprise";
    this.form = "turns";
    const again = () => {
      this.shown = PAGE;
      this.list();
    };
    this.search = el("input", { type: "search", placeholder: "words in a prompt or a completion", oninput: again });
    this.run = choice("Run", "all", again);
    this.step = choice("Step", "all", again);
    this.source = choice("Source", "all", again);
    this.outcome = choice("Outcome", "all", again);
    this.sort = el("select", { onchange: again }, ...["step", "reward", "advantage", "length"].map(name => el("option", { value: name }, name)));
    this.down = el("select", { "aria-label": "Order", onchange: again }, el("option", { value: "up" }, "lowest first"), el("option", { value: "down" }, "highest first"));
    this.about = el("p", { class: "faint", role: "status" });
    this.only = el("button", { type: "button", class: "only", hidden: "", onclick: () => this.filterTask("") });
    this.items = el("ol", { class: "entries", "aria-label": "Completions", onkeydown: event => this.onKey(event) });
    this.more = el("button", { type: "button", class: "more", onclick: () => {
      this.shown += PAGE;
      this.list();
    } });
    this.detail = el("div", { class: "detail", tabindex: "-1" });
    this.none = el("p", { class: "faint", hidden: "" }, "No completions are stored: the recipe has log.completions: null, or no step has finished.");
    const filters = el("div", { class: "filters" }, el("label", { class: "search" }, "Search ", this.search), this.run.node, this.step.node, this.source.node, this.outcome.node, el("label", {}, "Sort by ", this.sort, this.down), this.only);
    this.body = el("div", {}, filters, this.about, el("div", { class: "browser" }, el("div", { class: "side" }, this.items, this.more), this.detail));
    root.replaceChildren(el("h2", {}, "Completion browser"), this.none, this.body);
  }

  /** Take the current data of the selected runs. */
  refresh() {
    this.entries = shownRuns().flatMap(([run]) => (run.completions ? run.completions.rows.map(row => entryOf(run, row)) : []));
    this.none.hidden = this.entries.length > 0;
    this.body.hidden = this.entries.length === 0;
    const distinct = of => [...new Set(this.entries.flatMap(of))];
    const plain = values => values.map(value => [String(value), String(value)]);
    fill(this.run, plain(distinct(entry => [entry.run])));
    fill(this.step, distinct(entry => [entry.row.step]).sort((a, b) => a - b).map(step => [String(step), step.toLocaleString("en-US")]));
    fill(this.source, plain(distinct(entry => [entry.task.source])));
    fill(this.outcome, plain(distinct(entry => outcomes(entry.row)).sort()));
    for (const one of [this.run, this.source]) one.node.hidden = one.select.options.length < 3;
    const chosen = this.chosen && this.entries.find(entry => entry.id === this.chosen.id);
    this.chosen = chosen || null;
    const side = this.items.parentElement, above = side.scrollTop;
    this.list();
    side.scrollTop = above;
    if (!this.chosen && this.entries.length) this.choose(this.found[0] || this.entries[0]);
  }

  list() {
    const wishes = { run: this.run.select.value, step: this.step.select.value, source: this.source.select.value, outcome: this.outcome.select.value, task: this.task, search: this.search.value.trim() };
    this.found = sortEntries(this.entries.filter(entry => isWanted(entry, wishes)), this.sort.value, this.down.value === "down");
    const page = this.found.slice(0, this.shown);
    this.items.replaceChildren(...page.map(entry => el("li", {}, this.item(entry))));
    const left = this.found.length - page.length;
    this.more.hidden = left <= 0;
    this.more.textContent = `Show ${Math.min(left, PAGE)} more of ${left.toLocaleString("en-US")}`;
    this.only.hidden = this.task === "";
    this.only.textContent = "Only one prompt ✕";
    this.tellCounts();
  }

  tellCounts() {
    const runs = shownRuns().map(([run]) => run.completions).filter(Boolean);
    const total = runs.reduce((sum, one) => sum + one.total, 0), stored = runs.reduce((sum, one) => sum + one.stored, 0);
    const here = this.entries.length;
    const of = here < total ? ` This page has ${here.toLocaleString("en-US")} of the ${total.toLocaleString("en-US")} completions that are stored for ${stored.toLocaleString("en-US")} steps: the prompts that were sampled most often, and steps spread over the run.` : "";
    this.about.textContent = `${this.found.length.toLocaleString("en-US")} found.${of}`;
  }

  item(entry) {
    const { row } = entry, words = entry.text.trim().replace(/\s+/g, " ").slice(0, 140);
    const facts = [rewardBadge(row), el("span", {}, `adv ${formatSigned(row.advantage)}`), el("span", {}, `${row.tokens.toLocaleString("en-US")} tok`), el("span", {}, `step ${row.step.toLocaleString("en-US")}`)];
    if (state.data.runs.length > 1) facts.push(el("span", {}, entry.run));
    const button = el("button", { type: "button", class: "entry", "aria-current": this.chosen && this.chosen.id === entry.id ? "true" : "false", onclick: () => this.choose(entry) }, el("span", { class: "facts" }, ...facts), el("span", { class: "words" }, words || "(empty)"));
    entry.button = button;
    return button;
  }

  onKey(event) {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!move || !event.target.closest(".entry")) return;
    event.preventDefault();
    const buttons = [...this.items.querySelectorAll("button.entry")];
    const next = buttons[buttons.indexOf(event.target.closest(".entry")) + move];
    if (next) {
      next.focus();
      next.click();
    }
  }

  filterTask(key) {
    this.task = key;
    this.shown = PAGE;
    this.list();
  }

  choose(entry) {
    this.chosen = entry;
    this.other = null;
    for (const button of this.items.querySelectorAll("button.entry")) button.setAttribute("aria-current", "false");
    if (entry.button) entry.button.setAttribute("aria-current", "true");
    this.show();
  }

  /** The selected completion. */
  show() {
    const { row, task } = this.chosen;
    const facts = [["step", row.step.toLocaleString("en-US")], ["advantage", formatSigned(row.advantage)], ["length", `${row.tokens.toLocaleString("en-US")} tokens`], ["ended by", row.finish]];
    if (row.penalty) facts.push(["penalty", formatNumber(row.penalty)]);
    if (task.source) facts.push(["task", `${task.source} ${task.index}`]);
    for (const [name, score] of Object.entries(row.scores || {})) facts.push([name, score === null ? "no score" : formatNumber(score)]);
    for (const [name, value] of Object.entries(task.columns)) facts.push([name, value]);
    for (const [name, value] of Object.entries(row.extras || {})) facts.push([name, value]);
    const failures = Object.entries(row.failures || {}).map(([name, why]) => el("p", { class: "failure" }, `${name} failed: ${why}`));
    this.detail.replaceChildren(
      el("div", { class: "head" }, rewardBadge(row), el("h3", {}, `${state.data.runs.length > 1 ? `${this.chosen.run}, ` : ""}step ${row.step.toLocaleString("en-US")}, prompt ${row.group + 1}, completion ${row.index + 1}`)),
      el("dl", { class: "facts" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      ...failures,
      el("h4", {}, "Prompt"),
      ...this.chosen.messages.map(([role, text]) => el("div", { class: "turn said" }, role ? el("p", { class: "who" }, role) : null, el("pre", {}, text))),
      el("h4", {}, "Completion"),
      ...this.answer(row),
      ...this.overTime(),
    );
  }

  /** The text after the prompt: as turns, as tokens, or as plain text. */
  answer(row) {
    const tokens = tokensOf(row), choices = [];
    const pick = (label, options, now, change) => {
      const select = el("select", { onchange: event => {
        change(event.target.value);
        this.show();
      } }, ...options.map(([value, text]) => el("option", { value }, text)));
      select.value = now;
      choices.push(el("label", {}, `${label} `, select));
    };
    const asTurns = row.turns && (this.form === "turns" || row.text === undefined);
    if (row.turns && row.text !== undefined) pick("Show", [["turns", "turns"], ["text", "tokens as one text"]], this.form, value => (this.form = value));
    if (asTurns) return [el("div", { class: "choices" }, ...choices), ...row.turns.map(turnNode)];
    if (!tokens) return [...choices, el("pre", { class: "answer" }, row.text)];
    const kinds = [["surprise", "surprise (−log p)"], ["advantage", "advantage"], ["none", "nothing"]].filter(([kind]) => kind === "none" || tokens.some(token => token[kind] !== null));
    const color = kinds.some(([kind]) => kind === this.color) ? this.color : "none";
    pick("Color tokens by", kinds, color, value => (this.color = value));
    return [el("div", { class: "choices" }, ...choices, scaleOf(color, tokens)), el("pre", { class: "answer" }, ...tokens.map(token => tokenNode(token, color, tokens)))];
  }

  /** The other completions of this prompt, by run and step, and the difference to a selected one. */
  overTime() {
    const same = this.entries.filter(entry => entry.key === this.chosen.key && entry.promptKey === this.chosen.promptKey);
    if (same.length < 2) return [];
    const steps = new Map();
    for (const entry of same) {
      const name = JSON.stringify([entry.run, entry.row.step]);
      steps.set(name, [...(steps.get(name) || []), entry]);
    }
    const rows = [...steps.values()].map(entries => {
      const rewards = entries.map(entry => entry.row.reward).filter(reward => reward !== null);
      const mean = rewards.length ? rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length : null;
      const buttons = entries.map(entry => el("button", { type: "button", class: "mini", "aria-current": entry.id === this.chosen.id ? "true" : "false", title: `completion ${entry.row.index + 1}: reward ${formatNumber(entry.row.reward)}`, onclick: () => this.choose(entry) }, formatNumber(entry.row.reward)));
      const cells = [entries[0].row.step.toLocaleString("en-US"), formatNumber(mean)].map(text => el("td", {}, text));
      return el("tr", {}, ...(state.data.runs.length > 1 ? [el("td", {}, entries[0].run)] : []), ...cells, el("td", {}, ...buttons));
    });
    const heads = [...(state.data.runs.length > 1 ? ["run"] : []), "step", "mean reward", "rewards: open a completion"];
    const table = el("table", { class: "times" }, el("thead", {}, el("tr", {}, ...heads.map(text => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows));
    const only = el("button", { type: "button", onclick: () => this.filterTask(this.chosen.key) }, "List only this prompt");
    const title = steps.size > 1 ? "This prompt over time" : "Other completions of this prompt";
    return [el("h4", {}, title), table, el("div", { class: "choices" }, this.comparing(same), only), ...this.compared()];
  }

  comparing(same) {
    const others = same.filter(entry => entry.id !== this.chosen.id).slice(0, MOST_COMPARED);
    const several = state.data.runs.length > 1;
    const told = entry => `${several ? `${entry.run}, ` : ""}step ${entry.row.step}, completion ${entry.row.index + 1}, reward ${formatNumber(entry.row.reward)}`;
    const select = el("select", { onchange: event => {
      this.other = others.find(entry => entry.id === event.target.value) || null;
      this.show();
      this.detail.querySelector(".compare select").focus();
    } }, el("option", { value: "" }, "nothing"), ...others.map(entry => el("option", { value: entry.id }, told(entry))));
    select.value = this.other ? this.other.id : "";
    return el("label", { class: "compare" }, "Compare with ", select);
  }

  compared() {
    if (!this.other) return [];
    const parts = difference(this.other.text, this.chosen.text);
    if (parts.every(([kind]) => kind === "same")) return [el("p", { class: "faint" }, "The two completions are identical.")];
    const nodes = parts.map(([kind, text]) => (kind === "same" ? text : el(kind === "gone" ? "del" : "ins", {}, text)));
    return [el("p", { class: "faint" }, "Strikethrough: only in the other completion. Underlined: only in this completion."), el("pre", { class: "answer" }, ...nodes)];
  }
}

function entryOf(run, row) {
  const task = run.completions.tasks[row.task], messages = run.completions.prompts[row.prompt];
  const prompt = messages.map(([, text]) => text).join("\n");
  return {
    run: run.name, row, task, messages, prompt, text: spoken(row),
    id: JSON.stringify([run.name, row.step, row.group, row.index]),
    key: JSON.stringify([task.source, task.index]),
    promptKey: prompt,
  };
}

function rewardBadge(row) {
  const kind = row.reward === null ? "none" : row.advantage > 0 ? "good" : row.advantage < 0 ? "bad" : "even";
  return el("span", { class: `badge ${kind}` }, row.reward === null ? "no reward" : `reward ${formatNumber(row.reward)}`);
}

function turnNode(turn) {
  const own = turn.who === "model", notes = [];
  if (turn.reward !== undefined) notes.push(`reward ${formatNumber(turn.reward)}`);
  if (turn.advantage !== undefined) notes.push(`advantage ${formatSigned(turn.advantage)}`);
  return el("div", { class: `turn ${own ? "own" : turn.who ? "said" : "end"}` },
    turn.who ? el("p", { class: "who" }, [turn.who, ...notes].join(" · ")) : null,
    turn.text || !turn.calls ? el("pre", {}, turn.text) : null,
    ...(turn.calls || []).map(call => el("pre", { class: "call" }, `→ ${call}`)));
}

/** The color intensity of a token, from -1 to 1. */
function strength(token, color, tokens) {
  if (color === "none" || token[color] === null) return 0;
  if (color === "surprise") return Math.min(1, token.surprise / 5);
  const most = Math.max(...extremes(tokens.map(one => Math.abs(one.advantage ?? 0))), 1);
  return token.advantage / most;
}

function tokenNode(token, color, tokens) {
  const part = strength(token, color, tokens);
  const node = el("span", { class: token.trained ? "token" : "token untrained" }, token.text);
  if (part) {
    const hue = color === "surprise" ? "--surprise" : part > 0 ? "--better" : "--worse";
    node.style.background = `color-mix(in srgb, var(${hue}) ${Math.round(Math.abs(part) * 50)}%, transparent)`;
  }
  const told = [token.surprise === null ? null : `p = ${formatNumber(Math.exp(-token.surprise))}, −log p = ${formatNumber(token.surprise)}`, token.advantage === null ? "not sampled: the policy does not learn from it" : `advantage ${formatSigned(token.advantage)}`];
  node.title = told.filter(Boolean).join("\n");
  return node;
}

function scaleOf(color) {
  if (color === "surprise") return el("span", { class: "scale" }, "sure ", el("span", { class: "ramp surprise", "aria-hidden": "true" }), " surprised (5 nats)");
  if (color === "advantage") return el("span", { class: "scale" }, "worse ", el("span", { class: "ramp advantage", "aria-hidden": "true" }), " better than its group");
  return null;
}

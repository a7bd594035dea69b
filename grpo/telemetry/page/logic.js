/* Pure functions: number formats, curves, completion filters, tokens, differences. No document, no state. */

/** A number in at most four significant digits, with separators of thousands. */
function formatNumber(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size < 0.001) return value.toExponential(1).replace("e-", "e−").replace(/^-/, "−");
  return String(Number(value.toPrecision(size < 1 ? 3 : 4))).replace("-", "−");
}

/** A measured value with three decimals, like its interval. */
function formatMeasure(value) {
  return value !== null && value !== undefined && Math.abs(value) < 10 ? value.toFixed(3).replace("-", "−") : formatNumber(value);
}

/** A value with its 95 % interval, if there is one. */
function formatInterval(value, low, high) {
  const around = low === null || low === undefined ? "" : ` (${formatMeasure(low)} to ${formatMeasure(high)})`;
  return formatMeasure(value) + around;
}

/** A number with its sign, for advantages. */
function formatSigned(value) {
  return value > 0 ? `+${formatNumber(value)}` : formatNumber(value);
}

/** A duration as text: 0.42 s, 31 s, 12 min 5 s, 3 h 20 min. */
function formatSeconds(seconds) {
  if (seconds < 10) return `${formatNumber(seconds)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  const minutes = Math.round(whole / 60);
  return `${Math.floor(minutes / 60)} h${minutes % 60 ? ` ${minutes % 60} min` : ""}`;
}

/**
 * An exponential moving average with bias correction. `weight` in [0, 1) is the weight of the previous mean. Missing
 * values (null) stay missing and do not change the mean.
 */
function smooth(values, weight) {
  let mean = 0, total = 0;
  return values.map(value => {
    if (value === null || value === undefined) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

/** The values that a logarithmic scale can show. */
function positive(values) {
  return values.map(value => (value !== null && value > 0 ? value : null));
}

/** Each list plus all lists before it; missing values count as 0. */
function stacked(lists) {
  const sums = [];
  let below = lists.length ? lists[0].map(() => 0) : [];
  for (const list of lists) {
    below = list.map((value, i) => (value ?? 0) + below[i]);
    sums.push(below);
  }
  return sums;
}

/** The seconds of training behind each step: the sums of `seconds` along `steps`, as a function of the step. */
function clockOf(steps, seconds, every = 1) {
  const sums = [];
  let sum = 0;
  seconds.forEach((value, i) => {
    sum += (value ?? 0) * (i ? steps[i] - steps[i - 1] : Math.min(every, steps[0]));
    sums.push(sum);
  });
  return step => {
    let i = steps.length - 1;
    while (i >= 0 && steps[i] > step) i -= 1;
    return i < 0 ? 0 : sums[i];
  };
}

/** The value at an index, or the last known value before it. */
function valueBefore(values, place) {
  for (let i = Math.min(place, values.length - 1); i >= 0; i -= 1) {
    if (values[i] !== null && values[i] !== undefined) return values[i];
  }
  return null;
}

/** The text of a completion, for the search. */
function spoken(row) {
  if (row.turns) return row.turns.map(turn => [turn.text, ...(turn.calls || [])].join("\n")).join("\n");
  return row.text || "";
}

/** The outcomes of a completion, for the filter. */
function outcomes(row) {
  const found = [`ended: ${row.finish}`];
  if (row.reward === null) found.push("no reward");
  for (const name of Object.keys(row.failures || {})) found.push(`${name} failed`);
  return found;
}

/**
 * Whether an entry {run, row, task, prompt, text} matches the filter {run, step, source, outcome, task, search}. An
 * empty field of the filter matches everything.
 */
function isWanted(entry, wishes) {
  if (wishes.run && entry.run !== wishes.run) return false;
  if (wishes.step && String(entry.row.step) !== String(wishes.step)) return false;
  if (wishes.source && entry.task.source !== wishes.source) return false;
  if (wishes.task && entry.key !== wishes.task) return false;
  if (wishes.outcome && !outcomes(entry.row).includes(wishes.outcome)) return false;
  if (!wishes.search) return true;
  const words = wishes.search.toLowerCase();
  return entry.text.toLowerCase().includes(words) || entry.prompt.toLowerCase().includes(words);
}

const SORT_KEYS = {
  step: entry => entry.row.step,
  reward: entry => entry.row.reward,
  advantage: entry => entry.row.advantage,
  length: entry => entry.row.tokens,
};

/** Entries sorted by a key; entries without a value come last in either direction, equal entries keep their order. */
function sortEntries(entries, key, descending) {
  const value = SORT_KEYS[key];
  return entries
    .map((entry, place) => ({ entry, place, value: value(entry) }))
    .sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.place - b.place;
      return (descending ? b.value - a.value : a.value - b.value) || a.place - b.place;
    })
    .map(one => one.entry);
}

const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/** The inverse of `counts` in text.py. */
function countsOf(text) {
  const counts = [];
  let carried = 0;
  for (const character of text) {
    if (character === "_") carried += 63;
    else {
      counts.push(carried + DIGITS.indexOf(character));
      carried = 0;
    }
  }
  return counts;
}

/** The tokens of a completion: [{text, trained, turn, surprise, advantage}, …]; null if they are unknown. */
function tokensOf(row) {
  if (row.characters === undefined || row.text === undefined) return null;
  const characters = Array.from(row.text); // whole characters, as Python counts them
  const surprise = row.columns && row.columns.surprise;
  const tokens = [];
  let at = 0, turn = -1, before = false;
  const trained = trainedOf(row.trained, countsOf(row.characters).length);
  countsOf(row.characters).forEach((length, i) => {
    if (trained[i] && !before) turn += 1;
    before = trained[i];
    tokens.push({
      text: characters.slice(at, at + length).join(""),
      trained: trained[i],
      turn,
      surprise: surprise && trained[i] ? (DIGITS.indexOf(surprise[i]) / 16) ** 2 : null,
      advantage: !trained[i] ? null : row.turn_advantages ? row.turn_advantages[turn] ?? null : row.advantage,
    });
    at += length;
  });
  return tokens;
}

/** Whether each token is trained, from alternating lengths of trained and untrained spans. */
function trainedOf(spans, length) {
  if (!spans) return Array(length).fill(true);
  return spans.flatMap((span, i) => Array(span).fill(i % 2 === 0));
}

const MOST_CELLS = 4e6;

/**
 * The difference of two texts, word by word: [["same" | "gone" | "new", text], …]. Longer texts are compared line by
 * line. Texts that are too long even for that give all of one text and all of the other.
 */
function difference(before, after) {
  for (const pieces of [/\s+|\w+|[^\s\w]/gu, /[^\n]*\n|[^\n]+$/g]) {
    const a = before.match(pieces) || [], b = after.match(pieces) || [];
    let start = 0, end = 0;
    while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
    while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
    const left = a.slice(start, a.length - end), right = b.slice(start, b.length - end);
    if (left.length * right.length > MOST_CELLS) continue;
    const middle = commonParts(left, right);
    return joined([...a.slice(0, start).map(one => ["same", one]), ...middle, ...a.slice(a.length - end).map(one => ["same", one])]);
  }
  return joined([["gone", before], ["new", after]].filter(part => part[1]));
}

/** The difference of two lists, by the longest common subsequence. */
function commonParts(a, b) {
  const width = b.length + 1, lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      lengths[i * width + j] =
        a[i] === b[j] ? lengths[(i + 1) * width + j + 1] + 1 : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const parts = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      parts.push(["same", a[i]]);
      i += 1;
      j += 1;
    } else if (j >= b.length || (i < a.length && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) {
      parts.push(["gone", a[i]]);
      i += 1;
    } else {
      parts.push(["new", b[j]]);
      j += 1;
    }
  }
  return parts;
}

/** Merges neighbors of the same kind. */
function joined(parts) {
  const whole = [];
  for (const [kind, text] of parts) {
    if (whole.length && whole[whole.length - 1][0] === kind) whole[whole.length - 1][1] += text;
    else whole.push([kind, text]);
  }
  return whole;
}

/** New data instead of the old data; a run without completions in the new data keeps its old completions. */
function updated(old, fresh) {
  const kept = new Map(old.runs.map(run => [run.name, run.completions]));
  const runs = fresh.runs.map(run => ("completions" in run ? run : { ...run, completions: kept.get(run.name) ?? null }));
  return { ...fresh, runs };
}

if (typeof module !== "undefined") {
  module.exports = {
    formatNumber, formatMeasure, formatInterval, formatSigned, formatSeconds, smooth, positive, stacked, clockOf, valueBefore, spoken, outcomes,
    isWanted, sortEntries, countsOf, tokensOf, difference, updated,
  };
}

// Numbers for people, and lines of the last five minutes. Knows nothing of fleets.

export const WINDOW_SECONDS = 300;
const GAP_SECONDS = 5; // between two samples: longer, and the line is broken, for nothing is known of the time between

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const UNKNOWN = "–";

export function count(value) {
  return value == null ? UNKNOWN : whole.format(value);
}

export function compact(value) {
  return value == null ? UNKNOWN : Math.abs(value) < 10000 ? whole.format(value) : short.format(value);
}

/** Seconds as 0.4 ms, 84 ms, 1.24 s, 12.3 s, 3 min 4 s, 26 h 3 min, 12 d 4 h. */
export function duration(seconds) {
  if (seconds == null) return UNKNOWN;
  if (seconds < 0.0095) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.995) return `${seconds.toFixed(2)} s`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const total = Math.round(seconds);
  const minutes = Math.floor(total / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (minutes < 60) return `${minutes} min ${total % 60} s`;
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${days} d ${hours % 24} h`;
}


/** Texts of the elements marked data-field in `root`, found once; only what differs is written. */
export class Fields {
  constructor(root) {
    this.nodes = new Map();
    for (const node of root.querySelectorAll("[data-field]")) this.nodes.set(node.dataset.field, node);
  }

  set(name, text) {
    const node = this.nodes.get(name);
    if (node.textContent !== text) node.textContent = text;
    return node;
  }

  /** An element that is there only while it has something to say. */
  setOrHide(name, text) {
    this.set(name, text).hidden = text === "";
  }
}

/** Children of `parent`, one an item in the items' order, made when an item first appears and kept while it stays. */
export class Keyed {
  constructor(parent, keyOf, make) {
    this.parent = parent;
    this.keyOf = keyOf;
    this.make = make;
    this.views = new Map();
  }

  update(items) {
    const keys = new Set(items.map(this.keyOf));
    for (const [key, view] of this.views) {
      if (keys.has(key)) continue;
      view.root.remove();
      this.views.delete(key);
    }
    let next = this.parent.firstElementChild;
    for (const item of items) {
      const key = this.keyOf(item);
      let view = this.views.get(key);
      if (!view) this.views.set(key, (view = this.make(item)));
      if (view.root === next) next = next.nextElementSibling;
      else this.parent.insertBefore(view.root, next);
      view.update(item);
    }
  }
}

export class Chart {
  constructor(title) {
    this.root = document.getElementById("chart-template").content.firstElementChild.cloneNode(true);
    this.title = title;
    this.fields = new Fields(this.root);
    this.fields.set("title", title);
    this.svg = this.root.querySelector("svg");
    [this.area, this.line, this.second] = this.svg.querySelectorAll("path");
    this.samples = [];
  }

  /** Both lines now, null where unknown. The texts are what to say of the first, of it more closely, and of the second. */
  add(now, first, second, [value, note, ofSecond], format) {
    this.samples.push({ at: now, first, second });
    while (this.samples[0].at < now - WINDOW_SECONDS) this.samples.shift();
    this.fields.set("value", value);
    this.fields.set("note", note);
    this.fields.set("second", ofSecond);
    let most = 0;
    for (const sample of this.samples) most = Math.max(most, sample.first ?? 0, sample.second ?? 0);
    this.fields.set("most", most > 0 ? `max ${format(most)}` : "");
    const scale = most > 0 ? most * 1.08 : 1;
    const runs = this.#runs(now, scale, (sample) => sample.first);
    this.line.setAttribute("d", runs.map(joined).join(""));
    this.area.setAttribute("d", runs.map((run) => `${joined(run)}L${run.at(-1)[0]} 48L${run[0][0]} 48Z`).join(""));
    this.second.setAttribute("d", this.#runs(now, scale, (sample) => sample.second).map(joined).join(""));
    this.svg.setAttribute("aria-label", `${this.title} over the last five minutes, now ${value}`);
  }

  /** Points without a gap between them, run by run. */
  #runs(now, scale, valueOf) {
    const runs = [];
    let before = null;
    for (const sample of this.samples) {
      const value = valueOf(sample);
      if (value == null) { before = null; continue; }
      const x = 300 * (1 - (now - sample.at) / WINDOW_SECONDS), y = 47 - 46 * (value / scale);
      if (before === null || sample.at - before > GAP_SECONDS) runs.push([]);
      runs.at(-1).push([x.toFixed(1), y.toFixed(1)]);
      before = sample.at;
    }
    return runs;
  }
}

function joined(points) {
  return "M" + points.map(([x, y]) => `${x} ${y}`).join("L");
}

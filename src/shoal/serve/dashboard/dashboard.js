// Asks /fleet each second and shows the answer. Text reaches the page as text only; nothing is sent but the question.

import { Chart, Fields, Keyed, UNKNOWN, compact, count, duration } from "./charts.js";

const POLL_MS = 1000;
const TIMEOUT_MS = 4000;
const KEY = "shoal-api-key"; // in sessionStorage: gone with the tab, and no other origin's
const element = (id) => document.getElementById(id);
const byName = ({ name }) => name;

// --- one endpoint, a row ---------------------------------------------------------------------------------------------

class EndpointRow {
  constructor(endpoint) {
    this.root = element("endpoint-template").content.firstElementChild.cloneNode(true);
    this.fields = new Fields(this.root);
    this.icon = this.root.querySelector("use");
    this.bar = this.root.querySelector(".bar");
    this.bar.setAttribute("aria-label", `KV use of ${endpoint.name}`);
  }

  update(endpoint) {
    const set = (name, text) => this.fields.set(name, text);
    this.root.dataset.state = endpoint.state;
    this.icon.setAttribute("href", `#state-${endpoint.state}`);
    set("name", endpoint.name);
    set("address", endpoint.address);
    this.fields.nodes.get("spare").hidden = !endpoint.spare;
    set("state", endpoint.state);
    set("reason", endpoint.reason ?? "");
    set("layout", endpoint.layout || (endpoint.kind === "openai" ? "OpenAI API" : UNKNOWN));
    set("dtype", endpoint.dtype);
    set("requests", count(endpoint.requests));
    set("tokens", endpoint.tokens ? `${compact(endpoint.tokens)} tokens` : "");
    set("engine-running", endpoint.num_running == null ? UNKNOWN : `${count(endpoint.num_running)} running`);
    set("engine-waiting", endpoint.num_waiting ? `${count(endpoint.num_waiting)} waiting` : "");
    set("decode", endpoint.decode_seconds == null ? UNKNOWN : `${duration(endpoint.decode_seconds)} a token`);
    set("prefill", endpoint.prefill_speed == null ? "" : `prefill ${compact(endpoint.prefill_speed)} tokens/s`);
    set("step-age", endpoint.step_age == null ? UNKNOWN : `${duration(endpoint.step_age)} ago`);
    set("median-step", endpoint.median_step == null ? "" : `median ${duration(endpoint.median_step)}`);
    set("completed", count(endpoint.completed));
    set("failures", endpoint.failures ? `${count(endpoint.failures)} failed` : "");
    set("restarts", count(endpoint.restarts));
    set("breaker", endpoint.breaker === "closed" ? "" : `breaker ${endpoint.breaker.replace("_", " ")}`);
    this.#kvUse(endpoint.kv_usage);
  }

  #kvUse(share) {
    const percent = share == null ? null : Math.round(100 * share);
    this.fields.set("kv", percent == null ? UNKNOWN : `${percent}%`);
    this.bar.hidden = percent == null;
    if (percent == null) return;
    this.bar.setAttribute("aria-valuenow", percent);
    this.bar.dataset.level = percent >= 97 ? "full" : percent >= 85 ? "high" : "normal";
    this.bar.firstElementChild.style.width = `${percent}%`;
  }
}

// --- one model, a panel ----------------------------------------------------------------------------------------------

const COUNTERS = [
  ["accepted", "Accepted"], ["completed", "Completed"], ["failed", "Failed"], ["refused", "Refused"],
  ["migrations", "Migrations"], ["retries", "Retries"], ["hedges", "Hedges"], ["degradations", "Degraded"],
  ["generated_tokens", "Tokens generated"],
];

class ModelPanel {
  constructor(model) {
    this.root = element("model-template").content.firstElementChild.cloneNode(true);
    this.fields = new Fields(this.root);
    this.root.querySelector("caption").textContent = `Endpoints of ${model.name}`;
    this.root.setAttribute("aria-label", `Model ${model.name}`);
    this.endpoints = new Keyed(this.root.querySelector("tbody"), byName, (endpoint) => new EndpointRow(endpoint));
    this.charts = {};
    for (const [name, title] of [
      ["ttft", "Time to first token"], ["itl", "Between tokens"], ["e2e", "Whole request"],
      ["speed", "Tokens a second"], ["load", "In flight and queue"],
    ]) {
      this.charts[name] = new Chart(title);
      this.root.querySelector(".charts").append(this.charts[name].root);
    }
    this.counters = new Map();
    for (const [name, title] of COUNTERS) {
      const pair = document.createElement("div"), term = document.createElement("dt"), value = document.createElement("dd");
      term.textContent = title;
      pair.append(term, value);
      this.root.querySelector(".counters").append(pair);
      this.counters.set(name, value);
    }
  }

  update(model) {
    this.fields.set("name", model.name);
    this.fields.set("policy", model.policy.replaceAll("_", " "));
    const spare = spareCapacity(model.n_plus_one);
    this.fields.set("spare", `N+1 ${spare.text}`).dataset.level = spare.level;
    this.fields.setOrHide("degraded", model.served_by ? `served by ${model.served_by}` : "");
    this.fields.nodes.get("no-endpoints").hidden = model.endpoints.length > 0;
    this.root.querySelector("table").hidden = model.endpoints.length === 0;
    this.endpoints.update(model.endpoints);
    for (const [name, value] of this.counters) {
      const text = compact(model[name]);
      if (value.textContent !== text) value.textContent = text;
      value.classList.toggle("bad", name === "failed" && model.failed > 0);
    }
    this.#chart(model);
  }

  #chart(model) {
    const now = performance.now() / 1000, charts = this.charts;
    for (const name of ["ttft", "itl", "e2e"]) {
      const of = model[name];
      const texts = of.count
        ? [duration(of.p50), `median · p90 ${duration(of.p90)}`, `p99 ${duration(of.p99)}`]
        : [UNKNOWN, "nothing in the last 5 min", ""];
      charts[name].add(now, of.p50, of.p99, texts, duration);
    }
    const speed = model.tokens_per_second;
    charts.speed.add(now, speed, null, [compact(speed), "over 10 s", ""], compact);
    const queue = model.waiting ? `${count(model.waiting)} queued, ${compact(model.waiting_tokens)} tokens` : "none queued";
    charts.load.add(now, model.running, model.waiting, [count(model.running), "running", queue], count);
  }
}

function spareCapacity(spare) {
  if (!spare.known) return { text: "unknown", level: "unknown" };
  if (spare.ok) return { text: "ok", level: "ok" };
  return { text: `short by ${compact(spare.short_by)} tokens/s`, level: "short" };
}

// --- events and banners ----------------------------------------------------------------------------------------------

function clock(time) {
  return time.toLocaleTimeString([], { hour12: false });
}

class EventLine {
  constructor(event) {
    this.root = document.createElement("li");
    const time = document.createElement("time"), kind = document.createElement("span"), text = document.createElement("span");
    const at = new Date(event.time * 1000);
    time.dateTime = at.toISOString();
    time.textContent = clock(at);
    time.title = at.toLocaleString();
    kind.className = "chip";
    kind.textContent = event.kind.replaceAll("_", " ");
    this.root.dataset.kind = event.kind;
    text.textContent = event.message;
    this.root.append(time, kind, text);
  }

  update() {}
}

class Banner {
  constructor({ level }) {
    this.root = document.createElement("p");
    this.root.className = `banner ${level}`;
  }

  update({ text }) {
    if (this.root.textContent !== text) this.root.textContent = text;
  }
}

const banners = new Keyed(element("banners"), (banner) => banner.key, (banner) => new Banner(banner));

function bannersOf(status, problem) {
  const shown = [];
  if (problem) shown.push({ key: "problem", level: "bad", text: problem });
  if (status?.draining) {
    shown.push({ key: "draining", level: "warn", text: "This gateway is draining: it ends once its requests have." });
  }
  if (status && !["off", "ok"].includes(status.audit)) {
    shown.push({ key: "audit", level: "bad", text: `Audit log: ${status.audit}` });
  }
  for (const model of status?.models ?? []) {
    if (model.served_by) {
      const text = `Requests for ${model.name} are served by ${model.served_by} until it has recovered.`;
      shown.push({ key: `degraded ${model.name}`, level: "warn", text });
    }
  }
  return shown;
}

// --- the whole fleet -------------------------------------------------------------------------------------------------

const facts = new Fields(document.querySelector(".facts"));
const overview = new Fields(document.querySelector(".overview"));
const models = new Keyed(element("models"), byName, (model) => new ModelPanel(model));
const events = new Keyed(
  element("events"),
  (event) => `${event.time} ${event.kind} ${event.message}`,
  (event) => new EventLine(event),
);

function show(status) {
  for (const part of [element("main"), document.querySelector(".facts")]) part.hidden = false;
  element("key-form").hidden = true;
  for (const name of ["version", "audit", "journal"]) facts.set(name, status[name]);
  facts.set("uptime", duration(status.uptime));
  showOverview(status);
  models.update(status.models);
  element("no-models").hidden = status.models.length > 0;
  const newestFirst = status.events.toReversed();
  events.update(newestFirst);
  element("no-events").hidden = newestFirst.length > 0;
}

function showOverview(status) {
  const sum = (name) => status.models.reduce((total, model) => total + model[name], 0);
  const endpoints = status.models.flatMap((model) => model.endpoints);
  const troubled = endpoints.filter((endpoint) => endpoint.state !== "ready");
  const ready = endpoints.length - troubled.length;
  const states = new Map();
  for (const { state } of troubled) states.set(state, (states.get(state) ?? 0) + 1);
  overview.set("ready", count(ready)).parentElement.dataset.level = troubled.length ? "short" : "ok";
  overview.set("total", ` of ${endpoints.length}`);
  overview.set("troubled", [...states].map(([state, number]) => `${number} ${state}`).join(", "));
  overview.set("running", count(sum("running")));
  overview.set("running-note", `${compact(sum("completed"))} completed, ${compact(sum("failed"))} failed`);
  overview.set("waiting", count(sum("waiting")));
  overview.set("waiting-note", `${compact(sum("waiting_tokens"))} tokens, ${compact(sum("refused"))} refused`);
  overview.set("speed", compact(sum("tokens_per_second")));
  overview.set("speed-note", `${compact(sum("generated_tokens"))} generated`);
  const short = status.models.filter((model) => model.n_plus_one.known && !model.n_plus_one.ok);
  const known = status.models.some((model) => model.n_plus_one.known);
  overview.set("spare", short.length ? "short" : known ? "survived" : "unknown").dataset.level = short.length ? "short" : known ? "ok" : "unknown";
  overview.set("spare-note", short.map((model) => `${model.name}: ${spareCapacity(model.n_plus_one).text}`).join(", "));
  overview.set("migrations", compact(sum("migrations")));
  overview.set("migrations-note", `${compact(sum("retries"))} retries, ${compact(sum("degradations"))} degraded`);
  document.title = troubled.length ? `${ready}/${endpoints.length} ready · shoal fleet` : "shoal fleet";
}

// --- asking ----------------------------------------------------------------------------------------------------------

let status = null; // the last that was heard
let heardAt = null; // the time of day of it
let problem = null; // why there is none newer

async function poll() {
  const key = sessionStorage.getItem(KEY);
  try {
    const response = await ask(key);
    if (response.status === 401 || response.status === 403) return askForKey(response.status, key);
    if (!response.ok) throw new Error(`it answered with status ${response.status}`);
    status = await response.json().catch(() => { throw new Error("its answer is cut off or no JSON"); });
    heardAt = new Date();
    problem = null;
    element("forget-key").hidden = !key;
    show(status);
  } catch (error) {
    problem = error.message;
  }
  showConnection();
  setTimeout(poll, POLL_MS);
}

async function ask(key) {
  try {
    return await fetch("fleet", {
      headers: key ? { authorization: `Bearer ${key}` } : {},
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
  } catch (error) {
    throw new Error(error.name === "TimeoutError" ? "it took too long" : "no connection");
  }
}

function showConnection() {
  const state = problem ? "lost" : "live";
  element("connection").dataset.state = state;
  element("connection-text").textContent = state === "live" ? "live" : "no answer";
  document.body.classList.toggle("stale", state === "lost" && status !== null);
  // The time, not the age: this is read aloud whenever it changes.
  const since = status ? ` What is shown is of ${clock(heardAt)}.` : "";
  banners.update(bannersOf(status, problem && `The gateway does not answer: ${problem}.${since}`));
}

/** Polling stops until a key was given: a wrong one each second would look like an attack. */
function askForKey(code, key) {
  const text = code === 403 ? "This key may not see the fleet: it lacks the scope." : "This key was not accepted.";
  if (key) element("key-problem").textContent = text;
  sessionStorage.removeItem(KEY);
  status = problem = null;
  for (const shown of [banners, models, events]) shown.update([]);
  for (const part of [element("main"), document.querySelector(".facts")]) part.hidden = true;
  element("forget-key").hidden = true;
  element("key-form").hidden = false;
  element("connection").dataset.state = "locked";
  element("connection-text").textContent = "key needed";
  element("key").focus();
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, element("key").value.trim());
  element("key").value = "";
  poll();
});

element("forget-key").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

poll();

// Elements, numbers as text, requests, and repetition while a page is shown.

export function h(tag, attributes = {}, ...children) {
  const svg = h.svg.has(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, each] of Object.entries(value)) node.style.setProperty(key, each);
    else if (!svg && name in node && name !== "list" && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((each) => each !== null && each !== undefined && each !== false));
  return node;
}
h.svg = new Set(["svg", "g", "path", "line", "text", "rect", "circle"]);

export const whole = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));

// `fixed`: with the zeros at the end, for numbers below each other
export function short(value, digits = 3, fixed = false) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) {
    const rounded = fixed ? value.toExponential(digits - 1) : Number(value.toPrecision(digits)).toExponential();
    return rounded.replace("e+", "e");
  }
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  const most = Math.min(places, 8);
  return value.toLocaleString("en", { minimumFractionDigits: fixed ? most : 0, maximumFractionDigits: most });
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  const hours = Math.round(minutes / 60);
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export const ago = (time) => (time ? `${duration(Math.max(0, Date.now() / 1000 - time))} ago` : "–");
export const rate = (value) => (value ? (value >= 1 ? `${short(value)} steps/s` : `${short(1 / value)} s/step`) : "–");
export const compute = (value) => (value === null || value === undefined ? "–" : value >= 1e6 ? `${short(value / 1e6)} EFLOPs`
  : value >= 1e3 ? `${short(value / 1e3)} PFLOPs` : value >= 0.1 || !value ? `${short(value)} TFLOPs` : `${short(value * 1e3)} GFLOPs`);

export class Refused extends Error {} // by the server, with a reason
export class Lost extends Error {} // no answer

async function answered(path, options) {
  let answer;
  const lost = document.getElementById("lost");
  try {
    answer = await fetch(path, options);
    lost.hidden = true;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    lost.hidden = false;
    throw new Lost("the server does not answer");
  }
  const text = await answer.text();
  if (!answer.ok) {
    let said = text;
    try { said = JSON.parse(text).error; } catch { /* plain text */ }
    throw new Refused(said || `the server answered ${answer.status}`);
  }
  return JSON.parse(text);
}

export const get = (path, signal) => answered(path, { cache: "no-cache", signal });
const post = (path, body = {}) =>
  answered(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });

// Calls `work` now and again `wait` ms after it has ended, while the page is visible and not left.
export function repeat(work, wait, signal) {
  let timer = 0;
  const round = async () => {
    if (signal.aborted) return;
    if (!document.hidden) {
      try { await work(); } catch (error) { if (!signal.aborted && !(error instanceof Lost)) console[error instanceof Refused ? "warn" : "error"](error); }
    }
    if (!signal.aborted) timer = setTimeout(round, typeof wait === "function" ? wait() : wait);
  };
  signal.addEventListener("abort", () => clearTimeout(timer));
  document.addEventListener("visibilitychange", () => { if (!document.hidden) { clearTimeout(timer); round(); } }, { signal });
  round();
}

// Calls `work` once, again while the server does not answer; what it refuses is said in `place`. A page that was left says nothing.
export async function prepared(work, place, signal) {
  while (!signal.aborted) {
    try {
      await work();
      return;
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Lost)) { place.append(...notes([error.message])); return; }
    }
    await new Promise((wake) => setTimeout(wake, 2000));
  }
}

export function stored(name, otherwise) {
  try { return JSON.parse(localStorage.getItem(`selftrans-${name}`)) ?? otherwise; } catch { return otherwise; }
}
export function store(name, value) {
  try { localStorage.setItem(`selftrans-${name}`, JSON.stringify(value)); } catch { /* private windows may refuse */ }
}

export const chip = (state) => h("span", { class: `chip ${state}` }, state);
export const notes = (lines) => (lines || []).map((line) => h("p", { class: "note" }, line));
export const field = (name, input, all = false) => h("label", { class: `field${all ? " all" : ""}` }, name, input);
export const number = (value, min, max, step = 1) => h("input", { type: "number", value, min, max, step });
export function select(options, value, onchange) {
  const node = h("select", { onchange: () => { named(); onchange?.(node.value); } },
    options.map(([key, text]) => h("option", { value: key, selected: String(key) === String(value) }, text)));
  const named = () => { node.title = node.selectedOptions[0]?.textContent || ""; }; // long names do not fit
  named();
  return node;
}
export const meter = (share, name = "meter") => h("div", { class: name }, h("i", { style: { width: `${100 * (share || 0)}%` } }));

// Starts a job and returns it; null where it is refused, and `place` says why.
export async function start(job, place) {
  place.replaceChildren();
  try {
    const started = await post("/api/jobs", job);
    document.dispatchEvent(new Event("job-started"));
    return started;
  } catch (error) {
    place.replaceChildren(...notes([error.message]));
    return null;
  }
}

// Calls `changed` with the job that runs or ran last, when that has changed. The event comes from main.js.
export function onJob(signal, changed) {
  let before = "";
  document.addEventListener("job", ({ detail }) => {
    const now = JSON.stringify(detail);
    if (now === before) return;
    before = now;
    changed(detail);
  }, { signal });
}

export const cancel = (job) => h("button", { class: "small", type: "button", onclick: () => post(`/api/jobs/${job.id}/cancel`) }, "Cancel");

// How far a job is, and what went wrong.
export function progress(job) {
  const said = notes([job.error, ...job.notes].filter(Boolean));
  if (job.state !== "running") return said;
  const left = job.left ? `, ${duration(job.left)} left` : "";
  return [meter(job.total ? Math.min(1, job.done / job.total) : 0, "progress"),
    h("div", { class: "row" }, h("span", { class: "fine" }, job.doing + left), h("span", { class: "grow" }), cancel(job)), ...said];
}

// Runs next to each other at equal steps, from the same noise and conditions; distances below.
import { Chart } from "./chart.js";
import { chip, get, h, notes, number, onJob, prepared, progress, repeat, select, start, store, stored, whole } from "./dom.js";
import { address, tiles } from "./pictures.js";

const sampled = new Map(); // `run:stage:step` -> {url, result}, of the last job

export function sidePage(main, { query, signal }) {
  let chosen = query.getAll("run");
  if (!chosen.length) chosen = stored("side", []);
  let [all, found, steps, step, source, timer, last] = [[], null, [], null, "previews", 0, null];
  const stages = {}; // run -> stage
  const picks = h("div", { class: "row" });
  const body = h("div", { class: "stack" });
  const slider = h("input", { type: "range", min: 0, value: 0, "aria-label": "step", oninput: () => { step = steps[slider.value]; pictures(); } });
  const at = h("output");
  const play = h("button", { type: "button", onclick: () => (timer ? halt() : go()) }, "Play");
  const sources = h("div", { class: "tabs" });
  const figures = h("div", { class: "sides" });
  const why = h("div", { class: "stack" });
  const form = h("div", { class: "row" });
  const charts = { step: new Chart("Distance over steps", { xlabel: "student steps", log: true, empty: "no run was measured (selftrans compare does)" }),
    tflops: new Chart("Distance over total compute", { xlabel: "TFLOPs, all stages and the teacher", log: true, empty: "no run was measured, or its compute is not known" }) };
  const alike = h("div", { class: "stack" });
  main.append(h("div", { class: "row" }, h("h1", {}, "Side by side"), h("span", { class: "grow" }), picks), body);
  const card = h("section", { class: "card stack" }, h("div", { class: "row" }, sources, h("span", { class: "grow" }), form), why, h("div", { class: "slider" }, play, slider, at), figures);
  const below = h("div", { class: "charts" }, charts.step.node, charts.tflops.node);

  const asked = { num: ["pictures", number(16, 1, 64)], steps: ["time steps", number(25, 1, 1000)], guidance_scale: ["guidance", number(1, 0, 50, 0.1)], seed: ["seed", number(0, 0, 2 ** 31)] };
  const begin = h("button", { class: "main", type: "button", onclick: sample }, "Sample");
  form.append(...Object.values(asked).map(([name, input]) => h("label", { class: "row fine" }, name, input)), begin);

  function halt() { clearInterval(timer); timer = 0; play.textContent = "Play"; }
  function go() {
    play.textContent = "Stop";
    timer = setInterval(() => { step = steps[(steps.indexOf(step) + 1) % steps.length]; pictures(); }, 700);
  }
  signal.addEventListener("abort", halt);

  function choosing() {
    const rest = all.filter((run) => !chosen.includes(run.id));
    picks.replaceChildren(rest.length && chosen.length < 8 ? select([["", "Add a run …"], ...rest.map((run) => [run.id, run.name])], "", (id) => { if (id) change([...chosen, id]); }) : "",
      ...(chosen.length ? [h("button", { type: "button", onclick: () => change([]) }, "Clear")] : []));
  }
  function change(runs) {
    chosen = runs;
    store("side", chosen);
    history.replaceState(null, "", `#/side?${chosen.map((id) => `run=${id}`).join("&")}`);
    found = null;
    step = null;
    load();
  }

  // one line; no advice where samples would not be alike either
  const different = (lines) => (lines.length ? [`These previews are not of the same noise and conditions: ${lines.slice(0, 3).join("; ")}.${lines.some((line) => /^(shape|conditions) /.test(line)) ? "" : " Sample from checkpoints instead."}`] : []);
  const stageOf = (run) => stages[run.id] ?? Object.keys(run.parts)[Object.keys(run.parts).length - 1];
  const held = (run, kind) => run.parts[stageOf(run)]?.[kind] || [];
  const shared = (kind) => found.runs.map((run) => held(run, kind)).reduce((a, b) => a.filter((each) => b.includes(each)));
  const key = (run, at_) => `${run.id}:${stageOf(run)}:${at_}`;

  async function load() {
    choosing();
    if (!chosen.length) {
      body.replaceChildren(h("section", { class: "card empty" }, h("p", {}, "Choose two runs or more: their samples at the same steps, from the same noise and the same labels.")));
      return;
    }
    try {
      found = await get(`/api/side?${chosen.map((id) => `run=${id}`).join("&")}`, signal);
    } catch (error) {
      if (!signal.aborted) body.replaceChildren(...notes([error.message]));
      return;
    }
    if (!body.contains(card)) { body.replaceChildren(card, alike, below); if (!shared("previews").length) source = "sampled"; }
    draw();
  }

  function draw() {
    if (!found) return;
    sources.replaceChildren(...[["previews", "Stored previews"], ["sampled", "Sampled from checkpoints"]].map(([name, text]) => h("button", { type: "button", "aria-pressed": String(source === name), onclick: () => { source = name; step = null; draw(); } }, text)));
    form.hidden = source !== "sampled";
    const before = step;
    steps = source === "previews" ? shared("previews") : shared("checkpoints");
    step = steps.includes(before) ? before : steps[steps.length - 1] ?? null;
    const said = source === "previews" && found.runs.length > 1 ? different(found.differences) : [];
    if (!steps.length) said.push(source === "previews" ? "These runs have no previews at the same steps; sample from their checkpoints instead." : "These runs have no checkpoints at the same steps.");
    why.replaceChildren(...notes(said), ...(last?.kind === "side" ? progress(last) : []));
    begin.disabled = !steps.length || last?.state === "running";
    begin.textContent = `Sample at ${steps.length} training step${steps.length === 1 ? "" : "s"}`;
    play.disabled = slider.disabled = steps.length < 2;
    slider.max = Math.max(0, steps.length - 1);
    alike.replaceChildren(...(found.distances.alike ? [] : notes(["The distances below were measured in different ways and must not be compared."])),
      ...(found.distances.metric ? [h("p", { class: "fine" }, `${found.distances.metric}, lower is better. Total compute counts every stage and the training of a given teacher.`)] : []));
    pictures();
  }

  function pictures() {
    slider.value = Math.max(0, steps.indexOf(step));
    at.textContent = step === null ? "" : `step ${whole(step)}`;
    for (const axis of ["step", "tflops"]) {
      const lines = found.runs.map((run, i) => {
        const [x, y] = found.distances[axis][run.id] || [[], []];
        return { name: run.name, colour: i, points: true, x, y, at: (found.distances.step[run.id]?.[0] || []).indexOf(step) };
      });
      charts[axis].show(lines, axis === "step" ? { cursor: step } : {});
    }
    figures.replaceChildren(...found.runs.map((run, i) => {
      const names = Object.keys(run.parts);
      const remove = h("button", { class: "small quiet", type: "button", "aria-label": `remove ${run.name}`, onclick: () => change(chosen.filter((id) => id !== run.id)) }, "✕");
      const stage = names.length > 1 ? select(names.map((name) => [name, name]), stageOf(run), (name) => { stages[run.id] = name; step = null; draw(); }) : null;
      const made = sampled.get(key(run, step));
      let shown = h("div", { class: "empty" }, source === "sampled" ? "not sampled yet" : "no preview");
      if (source === "previews" && step !== null && held(run, "previews").includes(step)) {
        shown = h("div", { class: "paper" }, h("img", { src: `/api/runs/${run.id}/previews/${names.indexOf(stageOf(run))}/${step}.png`, alt: `samples of ${run.name} at step ${step}` }));
      } else if (source === "sampled" && made) shown = tiles(made.url, made.result);
      return h("figure", {}, h("figcaption", {}, h("span", {}, h("i", { class: `swatch c${i % 8}` }), " ", h("a", { href: `#/run/${run.id}` }, run.name)), chip(run.state), h("span", { class: "grow" }), stage, remove), shown);
    }));
  }

  async function sample() {
    const settings = Object.fromEntries(Object.entries(asked).map(([name, [, input]]) => [name, Number(input.value)]));
    const conditions = found.runs.map((run) => ({ run: run.id, stage: stageOf(run), weights: "ema" }));
    const most = Math.max(1, Math.floor(64 / conditions.length));
    const every = Math.ceil(steps.length / most);
    const started = await start({ kind: "side", models: conditions, steps: steps.filter((_, i) => (steps.length - 1 - i) % every === 0), settings: { ...settings, sampler: "heun" } }, why);
    if (started) sampled.clear(); // those of a job before a refused one stay
  }

  onJob(signal, (job) => {
    last = job;
    if (job?.kind !== "side") return;
    for (const result of job.results) sampled.set(`${result.of.run}:${result.of.stage}:${result.of.step}`, { url: address(job.id, result), result });
    if (source === "sampled") draw();
  });

  prepared(async () => {
    all = (await get("/api/runs", signal)).runs.filter((run) => run.state !== "unreadable");
    const known = new Set(all.map((run) => run.id));
    chosen = chosen.filter((id) => known.has(id)).slice(0, 8);
    store("side", chosen);
    repeat(async () => { if (!timer) await load(); }, 4000, signal);
  }, main, signal);
}

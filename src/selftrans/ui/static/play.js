// The playground: one model, sampled with chosen labels or prompts, guidance, sampler and seed.
import { duration, field, h, number, onJob, prepared, progress, select, short, start } from "./dom.js";
import { address, Picker, tiles, trainedRuns } from "./pictures.js";

const made = []; // finished and running jobs of this page, newest first; {id, job}

export function playPage(main, { query, signal }) {
  const chosen = new Set();
  const inputs = {
    guidance_scale: number(1, 0, 100, 0.1), low: number(0, 0, 1, 0.05), high: number(1, 0, 1, 0.05), steps: number(25, 1, 1000), num: number(16, 1, 64),
    seed: number(0, 0, 2 ** 31), sampler: select([["heun", "heun (ode)"], ["euler", "euler"], ["sde", "sde (Euler–Maruyama)"]], "heun"),
  };
  const conditions = h("div", { class: "all stack" });
  const go = h("button", { class: "main all", type: "submit" }, "Sample");
  const said = h("div", { class: "all stack" });
  const results = h("div", { class: "stack" });
  let models = null;

  const scale = inputs.guidance_scale;
  const slide = h("input", { type: "range", min: 1, max: 10, step: 0.1, value: 1, "aria-label": "guidance", oninput: () => { scale.value = slide.value; } });
  scale.addEventListener("input", () => { slide.value = scale.value; });
  const fields = h("form", { class: "fields", onsubmit: (event) => { event.preventDefault(); sample(); } },
    h("div", { class: "all", id: "model" }), conditions, field("guidance (1: none)", scale), h("label", { class: "field" }, "\u00a0", slide),
    field("guided from t", inputs.low), field("to t (1 is noise)", inputs.high), field("sampler", inputs.sampler), field("time steps", inputs.steps),
    field("pictures", inputs.num), field("seed", inputs.seed), go, said);
  main.append(h("h1", {}, "Playground"), h("div", { class: "form" }, h("section", { class: "card" }, fields), results));

  function take(value, found) {
    const fresh = JSON.stringify(found.classes) !== JSON.stringify(models?.classes) || found.conditions !== models?.conditions;
    models = found;
    if (!fresh) return;
    const own = found.sample;
    inputs.guidance_scale.value = slide.value = own.guidance_scale ?? 1;
    [inputs.low.value, inputs.high.value] = own.guidance_interval || [0, 1];
    inputs.steps.value = Math.min(own.steps ?? 25, 50);
    inputs.sampler.value = own.sampler === "ode" ? "heun" : own.sampler ?? "heun";
    inputs.seed.value = own.seed ?? 0;
    chosen.clear();
    if (found.conditions === "text") {
      inputs.prompts = h("textarea", { placeholder: "one prompt on each line; empty: those of the run" });
      conditions.replaceChildren(field("prompts", inputs.prompts));
    } else if (found.conditions === "labels") {
      const button = (name, i) => h("button", { type: "button", "aria-pressed": "false", onclick: (event) => {
        if (!chosen.delete(i)) chosen.add(i);
        event.currentTarget.setAttribute("aria-pressed", String(chosen.has(i)));
        hint.textContent = chosen.size ? "" : "none chosen: all classes in turn";
      } }, name);
      const hint = h("p", { class: "fine" }, "none chosen: all classes in turn");
      const list = h("div", { class: "classes" }, found.classes.map(button));
      const search = found.classes.length > 40 ? h("input", { type: "search", placeholder: "find a class", oninput: () => { for (const each of list.children) each.hidden = !each.textContent.toLowerCase().includes(search.value.toLowerCase()); } }) : null;
      conditions.replaceChildren(h("div", { class: "field fine" }, "labels"), search || "", list, hint);
    } else conditions.replaceChildren(h("p", { class: "fine" }, "This model has no conditions."));
  }

  async function sample() {
    const settings = { num: Number(inputs.num.value), steps: Number(inputs.steps.value), sampler: inputs.sampler.value, seed: Number(inputs.seed.value), guidance_scale: Number(scale.value) };
    if (settings.guidance_scale !== 1) settings.guidance_interval = [Number(inputs.low.value), Number(inputs.high.value)];
    if (chosen.size) settings.labels = [...chosen].sort((a, b) => a - b);
    const prompts = (inputs.prompts?.value || "").split("\n").map((line) => line.trim()).filter(Boolean);
    if (models?.conditions === "text" && prompts.length) settings.prompts = prompts;
    const job = await start({ kind: "sample", model: picker.value, settings }, said);
    if (!job) return;
    made.unshift(job);
    made.length = Math.min(made.length, 8);
    draw();
  }

  function draw() {
    if (!made.length) {
      results.replaceChildren(h("section", { class: "card empty" }, "Samples appear here. The same seed gives the same noise, so change one setting and compare."));
      return;
    }
    results.replaceChildren(...made.map((job) => {
      const { settings } = job.about;
      const guided = settings.guidance_scale === 1 ? "no guidance" : `guidance ${short(settings.guidance_scale)}${settings.guidance_interval ? ` on t in [${settings.guidance_interval.join(", ")}]` : ""}`;
      return h("section", { class: "card stack" }, h("div", { class: "row" }, h("h2", {}, job.about.name), h("span", { class: "fine" }, `${guided} · ${settings.sampler}, ${settings.steps} steps · seed ${settings.seed}`),
        h("span", { class: "grow" }), h("span", { class: "fine" }, job.state === "done" ? duration(job.seconds) : job.state)),
        progress(job), job.results.map((result) => tiles(address(job.id, result), result)));
    }));
  }

  onJob(signal, (job) => {
    go.disabled = job?.state === "running";
    const at = made.findIndex((each) => each.id === job?.id);
    if (at >= 0) { made[at] = job; draw(); }
  });

  let picker;
  prepared(async () => {
    const found = await trainedRuns(main, query, signal);
    if (!found) return;
    picker = new Picker("model", found.runs, take);
    fields.querySelector("#model").replaceChildren(picker.node);
    draw();
    await picker.choose(found.first);
  }, main, signal);
}

// Pictures of a job: one png of tiles, cut into canvases; and choosing the weights of a run.
import { field, get, h, select, whole } from "./dom.js";

export const address = (job, result) => `/api/jobs/${job}/pictures/${result.picture}.png`;

const sheets = new Map();
function sheet(url) {
  if (!sheets.has(url)) {
    const image = new Image();
    image.src = url;
    const decoded = image.decode().then(() => image);
    sheets.set(url, decoded);
    decoded.catch(() => sheets.get(url) === decoded && sheets.delete(url)); // asked for again by the next tile
    if (sheets.size > 200) sheets.delete(sheets.keys().next().value);
  }
  return sheets.get(url);
}

export function tile(url, result, number) {
  const [height, width] = result.tile;
  const canvas = h("canvas", { width, height, class: width < 96 ? "pixels" : "" });
  sheet(url).then((image) => canvas.getContext("2d").drawImage(image, (number % result.columns) * width, Math.floor(number / result.columns) * height, width, height, 0, 0, width, height), () => {});
  return canvas;
}

export function tiles(url, result) {
  const numbers = Array.from({ length: result.count }, (_, i) => i);
  return h("div", { class: "tiles" }, numbers.map((i) => h("figure", { title: result.captions?.[i] || "" }, tile(url, result, i), result.captions?.[i] ? h("figcaption", {}, result.captions[i]) : null)));
}

// Choosing weights: run, stage, step, averaged or raw. `changed` is called with (weights, models of the run).
export class Picker {
  constructor(title, runs, changed) {
    Object.assign(this, { title, runs, changed, value: null, models: null });
    this.node = h("div", { class: "fields" });
  }

  async choose(run, { stage = null, step = null, weights = "ema" } = {}) {
    this.value = { run, stage, step, weights };
    this.draw();
    const detail = await get(`/api/runs/${run}`);
    if (this.value.run !== run) return;
    this.models = detail.models;
    this.settle();
    this.draw();
    this.changed?.(this.value, this.models);
  }

  settle() {
    const { stages } = this.models;
    const found = stages.find((each) => each.name === this.value.stage) || stages[stages.length - 1];
    this.value.stage = found?.name ?? null;
    if (!found?.checkpoints.includes(this.value.step)) this.value.step = found?.checkpoints[found.checkpoints.length - 1] ?? null;
  }

  draw() {
    const stages = this.models?.stages || [];
    const stage = stages.find((each) => each.name === this.value?.stage);
    const set = (name, change) => (value) => { this.value[name] = change(value); this.settle(); this.draw(); this.changed?.(this.value, this.models); };
    const choose = select(this.runs.map((each) => [each.id, each.name]), this.value?.run, (id) => this.choose(id));
    this.node.replaceChildren(field(this.title, choose, true),
      ...(stages.length > 1 ? [field("stage", select(stages.map((each) => [each.name, each.name]), this.value.stage, set("stage", String)), true)] : []),
      ...(stage ? [field("step", select([...stage.checkpoints].reverse().map((step) => [step, whole(step)]), this.value.step, set("step", Number))),
        field("weights", select([["ema", "averaged"], ["raw", "raw"]], this.value.weights, set("weights", String)))]
        : [h("p", { class: "fine all" }, this.models ? "This run has no checkpoint yet." : "…")]));
  }
}

// {runs that have trained, id of the one to begin with: that in the address, else the newest}; null, and said in `main`, where there is none.
export async function trainedRuns(main, query, signal) {
  const runs = (await get("/api/runs", signal)).runs.filter((run) => run.state !== "unreadable" && run.step !== null);
  if (!runs.length) {
    main.replaceChildren(h("section", { class: "card empty" }, "No run has trained yet."));
    return null;
  }
  const newest = runs.reduce((a, b) => ((b.changed || 0) > (a.changed || 0) ? b : a));
  return { runs, first: (runs.find((run) => run.id === query.get("run")) || newest).id };
}

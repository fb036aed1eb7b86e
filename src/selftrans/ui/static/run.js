// One run, live: where it is, its curves, its previews, what went wrong, its settings.
import { Chart } from "./chart.js";
import { ago, chip, compute, duration, get, h, notes, rate, Refused, repeat, short, whole } from "./dom.js";

const NORM = /(^grad_norm$|_norm$)/;

export function runPage(main, { rest, signal }) {
  const [id] = rest;
  let [chosen, step, follow, previews] = [null, null, true, []];
  const top = h("section", { class: "card stack" });
  const wrong = h("div", { class: "stack" });
  const tabs = h("div", { class: "tabs", role: "group", "aria-label": "stages" });
  const image = h("img", { alt: "", hidden: true });
  const slider = h("input", { type: "range", min: 0, value: 0, "aria-label": "step of the preview", oninput: () => { follow = Number(slider.value) === previews.length - 1; step = previews[slider.value]; picture(); } });
  const at = h("output");
  const pictureCard = h("section", { class: "card stack" }, h("div", { class: "row" }, h("h2", {}, "Preview"), h("span", { class: "fine" }, "averaged weights; the same noise and conditions at every step")),
    h("div", { class: "slider" }, slider, at), h("div", { class: "paper" }, image), h("p", { class: "fine" }));
  const accidents = h("section", { class: "card stack" });
  const charts = { loss: new Chart("Loss terms"), norms: new Chart("Norms"), distance: new Chart("Distance", { empty: "not measured" }), lr: new Chart("Learning rate") };
  const settings = h("section", { class: "card" });
  const grid = h("div", { class: "charts" }, charts.loss.node, charts.norms.node, charts.distance.node, charts.lr.node);
  main.append(top, wrong, h("div", { class: "row" }, tabs), h("div", { class: "two" }, h("div", { class: "stack" }, pictureCard, accidents), grid), settings);

  let stageAt = 0;
  function picture() {
    const none = !previews.length;
    pictureCard.hidden = none;
    if (none) return;
    const index = Math.max(0, previews.indexOf(step));
    slider.max = previews.length - 1;
    slider.value = index;
    slider.disabled = previews.length < 2;
    at.textContent = `step ${whole(previews[index])}`;
    const source = `/api/runs/${id}/previews/${stageAt}/${previews[index]}.png`;
    if (!image.src.endsWith(source)) { image.src = source; image.alt = `samples at step ${previews[index]}`; image.hidden = false; }
    for (const chart of [charts.loss, charts.norms]) if (chart.options.cursor !== previews[index]) { chart.options.cursor = previews[index]; chart.draw(); }
  }

  function draw(run) {
    document.title = `selftrans · ${run.name}`;
    const parts = run.parts || [];
    const current = Math.max(0, parts.findIndex((part) => part.name === run.stage));
    const index = chosen === null ? current : Math.min(chosen, parts.length - 1);
    const part = parts[index];
    const facts = [
      ["stage", run.stages > 1 ? `${run.stage} (${run.number} of ${run.stages})` : run.stage || "–"],
      ["step", `${whole(run.step)}${run.steps ? ` of ${whole(run.steps)}` : ""}`],
      ["rate", rate(run.rate)],
      run.state === "running" ? ["time left", duration(run.left)] : ["last change", ago(run.changed)],
      ["time trained", duration(parts.reduce((sum, each) => sum + (each.seconds || 0), 0))],
      ["compute so far", compute(run.tflops ?? parts.reduce((sum, each) => sum + (each.tflops || 0), 0))],
      ...(run.distance !== null && run.distance !== undefined ? [["distance", short(run.distance, 3, true)]] : []),
    ];
    const play = run.models?.stages?.length;
    top.replaceChildren(h("div", { class: "row" }, h("h1", {}, run.name), chip(run.state), h("span", { class: "grow" }),
      play ? h("a", { class: "button", href: `#/play?run=${id}` }, "Playground") : null, play ? h("a", { class: "button", href: `#/maps?run=${id}` }, "Features") : null,
      h("a", { class: "button", href: `#/side?run=${id}` }, "Side by side")),
      h("p", { class: "fine" }, [run.method, run.model, run.recipe && `recipe ${run.recipe}`, run.path].filter(Boolean).join(" · ")),
      h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
    wrong.replaceChildren(...notes(run.notes));
    tabs.replaceChildren(...(parts.length > 1 ? parts.map((each, i) => h("button", { type: "button", "aria-pressed": String(i === index), onclick: () => { chosen = i; step = null; follow = true; draw(run); } },
      `${each.name} · ${whole(each.step ?? 0)}${each.steps ? ` / ${whole(each.steps)}` : ""}`)) : []));
    if (!part) return;
    stageAt = index;
    previews = part.previews;
    if (follow || !previews.includes(step)) step = previews[previews.length - 1];
    const prompts = part.prompts.length ? `prompts, in order: ${part.prompts.join(" · ")}` : "";
    pictureCard.querySelector("p").textContent = prompts;
    picture();
    const lines = Object.entries(part.curves);
    const marks = part.skips.map((skip) => ({ x: Number(skip.step) })).filter((mark) => Number.isFinite(mark.x));
    const series = (keep) => lines.filter(([name]) => keep(name)).map(([name, curve]) => ({ name, ...curve }));
    charts.loss.show(series((name) => !NORM.test(name) && name !== "lr"), { marks });
    charts.norms.show(series((name) => NORM.test(name)), { marks });
    const rates = series((name) => name === "lr");
    charts.lr.node.hidden = !rates.length || Math.min(...rates[0].y) === Math.max(...rates[0].y);
    charts.lr.show(rates.map((each) => ({ ...each, name: "Learning rate" })));
    const points = index === parts.length - 1 ? run.measured : [];
    charts.distance.node.hidden = !points.length;
    charts.distance.show([{ name: points[0]?.metric || "distance", x: points.map((p) => p.step), y: points.map((p) => p.distance), points: true }]);
    accidentsOf(run, parts);
    settingsOf(run);
  }

  function accidentsOf(run, parts) {
    const lines = [];
    for (const part of parts) {
      const steps = part.skips.map((skip) => skip.step).slice(0, 12);
      if (part.skipped) lines.push(`${part.name}: ${whole(part.skipped)} updates skipped, since loss or gradient was not finite${steps.length ? ` (steps ${steps.join(", ")}${part.skipped > steps.length ? ", …" : ""})` : ""}`);
      if (part.damaged) lines.push(`${part.name}: ${whole(part.damaged)} damaged lines of log.jsonl are left out`);
      if (part.replaced) lines.push(`${part.name}: continued from an earlier checkpoint while this page was open`);
    }
    if (run.starts > 1) lines.push(`training was started ${run.starts} times`);
    for (const each of run.changes || []) {
      const reached = Object.entries(each?.steps || {}).map(([stage, value]) => `${stage} ${whole(value)}`).join(", ");
      if (Array.isArray(each?.changed)) lines.push(`settings changed at ${reached || "the start"}: ${each.changed.join("; ")}`);
    }
    accidents.replaceChildren(h("h2", {}, "Interruptions and changes"), ...(lines.length ? lines.map((line) => h("p", {}, line)) : [h("p", { class: "soft" }, "None: no update skipped, no restart, no changed settings.")]));
  }

  let settingsShown = "";
  function settingsOf(run) {
    const text = JSON.stringify(run.settings);
    if (text === settingsShown) return;
    settingsShown = text;
    const value = (each) => (each === null ? "–" : typeof each === "object" ? JSON.stringify(each) : String(each));
    const sections = Object.entries(run.settings).filter(([, each]) => each && typeof each === "object" && !Array.isArray(each));
    const open = settings.querySelector("details")?.open;
    settings.replaceChildren(h("details", { open: open || false }, h("summary", {}, h("b", {}, "Settings"), " · config.json"),
      h("div", { class: "charts" }, sections.map(([name, section]) => h("div", {}, h("h2", {}, name), h("table", { class: "settings" },
        Object.entries(section).map(([key, each]) => h("tr", {}, h("td", {}, key), h("td", {}, value(each))))))))));
  }

  repeat(async () => {
    try {
      draw(await get(`/api/runs/${encodeURIComponent(id)}`, signal));
    } catch (error) {
      if (error instanceof Refused) { main.replaceChildren(h("section", { class: "card empty" }, error.message, " ", h("a", { href: "#/" }, "All runs"))); }
      throw error;
    }
  }, 2000, signal);
}

// The list of runs, live.
import { sparkline } from "./chart.js";
import { ago, chip, compute, duration, get, h, meter, notes, rate, repeat, select, short, store, stored, whole } from "./dom.js";

const ORDERS = [["changed", "newest first"], ["name", "by name"], ["distance", "by distance"], ["loss", "by loss"]];
const STATES = ["all", "running", "done", "stopped", "begun", "unreadable"]; // the last two where there are any

export function runsPage(main, { signal }) {
  const picked = new Set(stored("picked", []));
  let [found, text, order, state] = [null, "", stored("order", "changed"), "all"];
  const filter = h("input", { type: "search", placeholder: "Filter", "aria-label": "filter", oninput: () => { text = filter.value.toLowerCase(); draw(); } });
  const states = h("div", { class: "tabs" });
  const side = h("a", { class: "button", href: "#/side" });
  const list = h("section", { class: "card runs" });
  const above = h("div", { class: "stack" });
  main.append(h("div", { class: "row" }, h("h1", {}, "Runs"), h("span", { class: "grow" }), filter, states,
    select(ORDERS, order, (value) => { order = value; store("order", order); draw(); }), side), above, list);

  const compare = {
    changed: (a, b) => (b.changed || 0) - (a.changed || 0),
    name: (a, b) => a.name.localeCompare(b.name, "en", { numeric: true }),
    distance: (a, b) => (a.distance ?? Infinity) - (b.distance ?? Infinity),
    loss: (a, b) => (a.loss ?? Infinity) - (b.loss ?? Infinity),
  };

  function draw() {
    if (!found) return;
    const known = new Set(found.runs.map((run) => run.id));
    for (const id of picked) if (!known.has(id)) picked.delete(id);
    side.textContent = picked.size ? `Side by side (${picked.size})` : "Side by side";
    side.href = `#/side?${[...picked].map((id) => `run=${id}`).join("&")}`;
    side.setAttribute("aria-disabled", String(!picked.size));
    const count = (name) => found.runs.filter((run) => name === "all" || run.state === name).length;
    states.replaceChildren(...STATES.filter((name, i) => i < 4 || name === state || count(name)).map((name) => h("button", { type: "button", "aria-pressed": String(name === state), onclick: () => { state = name; draw(); } },
      `${name} ${count(name)}`)));
    const shown = found.runs
      .filter((run) => (state === "all" || run.state === state) && `${run.name} ${run.method || ""} ${run.model || ""}`.toLowerCase().includes(text))
      .sort(compare[order]);
    above.replaceChildren(...notes(found.notes));
    if (!found.runs.length) {
      list.replaceChildren(h("div", { class: "empty" }, h("p", {}, `No runs in ${found.folders.join(", ")} yet.`),
        h("p", {}, "Start one with ", h("code", {}, "selftrans train digits --out runs/digits"), "; it appears here by itself.")));
      return;
    }
    const head = ["", "run", "state", "progress", "rate", "left", "loss", "distance", "compute"];
    const optional = new Set(["left", "distance"]);
    list.replaceChildren(h("div", { class: "line head" }, head.map((name) => h("span", { class: `${["rate", "left", "loss", "distance", "compute"].includes(name) ? "num" : ""}${optional.has(name) ? " optional" : ""}` }, name))),
      ...shown.map(line), ...(shown.length ? [] : [h("div", { class: "empty" }, "No run matches.")]));
  }

  function line(run) {
    const box = h("input", { type: "checkbox", checked: picked.has(run.id), "aria-label": `choose ${run.name} for side by side`,
      onchange: () => { if (box.checked) picked.add(run.id); else picked.delete(run.id); store("picked", [...picked]); draw(); } });
    if (run.state === "unreadable") {
      return h("div", { class: "line" }, h("span", { class: "pick" }, box), h("div", { class: "name" }, h("a", { href: `#/run/${run.id}` }, run.name)),
        h("span", { class: "state" }, chip(run.state)), h("div", { class: "wide" }, notes(run.notes)));
    }
    const accidents = [run.skipped ? `${whole(run.skipped)} skipped` : null, run.starts > 1 ? `restarted ${run.starts === 2 ? "once" : `${run.starts - 1} times`}` : null].filter(Boolean);
    const where = run.stages > 1 ? `${run.stage}, ${run.number}/${run.stages}` : "";
    return h("div", { class: `line ${run.state}` },
      h("span", { class: "pick" }, box),
      h("div", { class: "name" }, h("a", { href: `#/run/${run.id}` }, run.name), h("div", { class: "fine" }, [run.method, run.model].filter(Boolean).join(" · "))),
      h("div", { class: "state" }, chip(run.state), h("div", { class: "fine" }, ago(run.changed))),
      h("div", { class: "done-part" }, h("span", {}, `${whole(run.step)}${run.steps ? ` / ${whole(run.steps)}` : ""}`), " ", h("span", { class: "fine whole" }, where), meter(run.share)),
      h("span", { class: "num" }, rate(run.rate)),
      h("span", { class: `num optional${run.left ? " keep" : ""}`, "data-name": "left" }, duration(run.left)),
      h("span", { class: `spark${run.loss === null ? " optional" : ""}`, "data-name": "loss" }, sparkline(run.spark), h("span", {}, short(run.loss, 3, true))),
      h("span", { class: `num optional${run.distance ? " keep" : ""}`, "data-name": "distance" }, short(run.distance, 3, true)),
      h("span", { class: "num" }, compute(run.tflops)),
      accidents.length || run.notes.length ? h("div", { class: "wide row" }, accidents.length ? h("span", { class: "fine bad" }, accidents.join(", ")) : null, notes(run.notes)) : null);
  }

  let before = "";
  repeat(async () => {
    const fresh = await get("/api/runs", signal);
    const now = JSON.stringify(fresh);
    if (now === before && fresh.runs.every((run) => run.state !== "running")) return;
    before = now;
    found = fresh;
    if (!list.matches(":focus-within") || document.activeElement?.type !== "checkbox") draw();
  }, 2000, signal);
}

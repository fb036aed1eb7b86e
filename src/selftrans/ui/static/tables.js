// Comparisons: the table, the curves over both axes, and what the numbers depend on.
import { Chart } from "./chart.js";
import { get, h, notes, repeat } from "./dom.js";

export function tablesPage(main, { signal }) {
  const list = h("div", { class: "stack" }, h("p", { class: "soft" }, "reading …"));
  main.append(h("h1", {}, "Tables"), list);
  let before = "";
  repeat(async () => {
    const { tables } = await get("/api/tables", signal);
    const now = JSON.stringify(tables);
    if (now === before) return;
    before = now;
    list.replaceChildren(...(tables.length ? tables.map((table, i) => card(table, i === 0)) : [h("section", { class: "card empty" }, h("p", {}, "No comparison in these folders yet."),
      h("p", {}, h("code", {}, "selftrans compare digits --out runs/compared"), " writes one."))]));
  }, 5000, signal);
}

function card(table, open) {
  if (table.note) return h("section", { class: "card stack" }, h("h2", {}, table.name), ...notes([table.note]));
  const charts = [["step", "Distance over steps", "student steps"], ["tflops", "Distance over total compute", "TFLOPs, all stages and the teacher"]]
    .filter(([axis]) => Object.values(table.curves[axis] || {}).some((curve) => curve[0].length))
    .map(([axis, title, xlabel]) => {
      const chart = new Chart(title, { xlabel, log: true });
      chart.show(Object.entries(table.curves[axis]).map(([name, [x, y, spread]], i) => ({ name, x, y, colour: i, points: true,
        ...(spread?.some((each) => each > 0) ? { low: y.map((v, k) => v - spread[k]), high: y.map((v, k) => v + spread[k]) } : {}) })));
      chart.node.classList.remove("card");
      return chart.node;
    });
  return h("section", { class: "card stack" },
    h("div", { class: "row" }, h("h2", {}, table.name), h("span", { class: "fine" }, table.file)),
    table.outcome ? h("p", {}, h("b", {}, table.outcome)) : null,
    h("div", { class: "scroll" }, h("table", { class: "results" }, h("thead", {}, h("tr", {}, table.headings.map((each) => h("th", { title: each.depends && `depends on: ${each.depends}` }, each.name)))),
      h("tbody", {}, table.rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell))))))),
    h("p", { class: "fine" }, table.legend), h("div", { class: "charts" }, charts),
    h("details", { open }, h("summary", {}, "What the numbers depend on"), h("table", { class: "settings" },
      Object.entries(table.settings).map(([name, value]) => h("tr", {}, h("td", {}, name), h("td", {}, value))),
      table.headings.filter((each) => each.depends).map((each) => h("tr", {}, h("td", {}, `column: ${each.name}`), h("td", {}, each.depends))))));
}

// Features of a picture as PCA maps over blocks and t: what the teacher sees, what the student sees.
import { field, h, number, onJob, prepared, progress, start, whole } from "./dom.js";
import { address, Picker, tile, trainedRuns } from "./pictures.js";

let shown = null; // the last job of this kind

export function mapsPage(main, { query, signal }) {
  let [upload, models] = [null, null];
  const row = number(0, 0);
  const file = h("input", { type: "file", accept: "image/*", onchange: read });
  const label = h("select");
  const prompt = h("input", { type: "text", placeholder: "empty: the null condition" });
  const scale = number(1, 0, 1000, 0.5);
  const times = h("input", { type: "text", value: "0.2 0.4 0.6 0.8" });
  const taught = h("input", { type: "checkbox", checked: true });
  const go = h("button", { class: "main all", type: "submit" }, "Draw the maps");
  const said = h("div", { class: "all stack" });
  const place = { student: h("div", { class: "all" }), teacher: h("div", { class: "all" }), condition: h("div", { class: "all" }), hint: h("p", { class: "fine all" }) };
  const results = h("div", { class: "stack" });
  const form = h("form", { class: "fields", onsubmit: (event) => { event.preventDefault(); ask(); } }, place.student,
    h("label", { class: "row all fine" }, taught, "with the model that guides it"), place.teacher, field("row of its data", row), field("or a picture of your own", file, true), place.hint, place.condition,
    field("w of the teacher", scale), field("t (0 is data)", times), go, said);
  main.append(h("h1", {}, "Features"), h("div", { class: "form" }, h("section", { class: "card" }, form), results));
  taught.addEventListener("change", () => { place.teacher.hidden = !taught.checked; });

  function read() {
    const [found] = file.files;
    upload = null;
    place.hint.textContent = "";
    if (!found) return;
    const reader = new FileReader();
    reader.onload = () => { upload = String(reader.result).replace(/^[^,]*,/, ""); place.hint.textContent = `${found.name}, instead of the row`; };
    reader.readAsDataURL(found);
  }

  function take(value, found) {
    const fresh = models?.of !== value.run;
    models = { ...found, of: value.run };
    if (!fresh) return;
    scale.value = found.scale ?? 1;
    row.max = found.rows ? found.rows - 1 : "";
    const text = found.conditions === "text";
    label.replaceChildren(h("option", { value: "own" }, "label of the row"), h("option", { value: "null" }, "null (none)"), ...found.classes.map((name, i) => h("option", { value: i }, `label ${name}`)));
    place.condition.replaceChildren(...(text ? [field("prompt", prompt)] : found.conditions === "labels" ? [field("condition", label)] : []));
    taught.checked = Boolean(found.teacher);
    place.teacher.hidden = !taught.checked;
    if (found.teacher) teacher.choose(found.teacher.run, found.teacher);
  }

  async function ask() {
    const maps = { times: times.value.split(/[\s,;]+/).filter(Boolean).map(Number), row: Number(row.value), scale: Number(scale.value) };
    if (models?.conditions === "labels" && label.value === "null") maps.null = true;
    else if (models?.conditions === "labels" && label.value !== "own") maps.label = Number(label.value);
    if (models?.conditions === "text" && prompt.value.trim()) maps.prompt = prompt.value.trim();
    await start({ kind: "maps", student: student.value, teacher: taught.checked ? teacher.value : null, maps, upload }, said);
  }

  function draw() {
    if (!shown) {
      results.replaceChildren(h("section", { class: "card empty" }, "The first three principal components of a picture's features, as red, green and blue: one row for each block, one column for each t."));
      return;
    }
    const { results: found } = shown;
    const picture = found.find((each) => each.role === "picture");
    const sheets = found.filter((each) => each.role !== "picture");
    const guided = sheets.find((each) => each.role === "student")?.guided;
    const first = picture ? tile(address(shown.id, picture), picture, 0) : null;
    if (first) first.style.width = "96px";
    results.replaceChildren(h("section", { class: "card stack" }, h("div", { class: "row" }, first, h("div", {}, h("h2", {}, shown.about.uploaded ? "A picture of your own" : `Row ${whole(shown.about.maps.row)} of the data`),
      h("p", { class: "fine" }, "as the autoencoder decodes it. Colours may be compared along a row of maps, not between rows or models."))),
      progress(shown), shown.state === "cancelled" ? h("p", { class: "fine" }, "cancelled") : null),
      h("div", { class: "pair" }, sheets.map((each) => sheet(each, each.role === "student" ? guided?.student || [] : guided?.teacher ? [guided.teacher] : []))));
  }

  function sheet(each, marked) {
    const url = address(shown.id, each);
    const cells = each.blocks.flatMap((block, i) => [h("span", { class: `fine at${marked.includes(block) ? " guided" : ""}` }, `${marked.includes(block) ? (each.role === "student" ? "guided ▸ " : "guides ▸ ") : ""}block ${block}`),
      ...each.times.map((t, k) => { const canvas = tile(url, each, i * each.columns + k); canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", `block ${block}, t = ${t}`); return canvas; })]);
    return h("section", { class: "card stack" }, h("div", {}, h("h2", {}, each.role === "teacher" ? "What the teacher sees" : "What the student sees"), h("p", { class: "fine" }, `${each.name} · ${each.condition}`)),
      h("div", { class: "maps", style: { "grid-template-columns": `auto repeat(${each.columns}, minmax(0, 1fr))` } }, h("span"), each.times.map((t) => h("span", { class: "fine headed" }, `t = ${t}`)), cells));
  }

  onJob(signal, (job) => {
    go.disabled = job?.state === "running";
    if (job?.kind === "maps") { shown = job; draw(); }
  });

  let [student, teacher] = [null, null];
  prepared(async () => {
    const found = await trainedRuns(main, query, signal);
    if (!found) return;
    student = new Picker("student", found.runs, take);
    teacher = new Picker("teacher", found.runs);
    place.student.replaceChildren(student.node);
    place.teacher.replaceChildren(teacher.node);
    draw();
    await teacher.choose(found.first);
    await student.choose(found.first);
  }, main, signal);
}

// Which page is shown, the theme, and the job that runs.
import { cancel, duration, get, h, repeat, store, stored } from "./dom.js";
import { mapsPage } from "./maps.js";
import { playPage } from "./play.js";
import { runPage } from "./run.js";
import { runsPage } from "./runs.js";
import { sidePage } from "./side.js";
import { tablesPage } from "./tables.js";

const PAGES = [["", "Runs", runsPage], ["side", "Side by side", sidePage], ["play", "Playground", playPage], ["maps", "Features", mapsPage],
  ["tables", "Tables", tablesPage], ["run", null, runPage]];
let left = new AbortController();

function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/");
  const found = PAGES.find((each) => each[0] === name) || PAGES[0];
  left.abort();
  left = new AbortController();
  document.getElementById("nav").replaceChildren(...PAGES.filter((each) => each[1]).map(([key, text]) =>
    h("a", { href: `#/${key}`, "aria-current": key === (found[0] === "run" ? "" : found[0]) ? "page" : null }, text)));
  const main = document.getElementById("main");
  main.replaceChildren();
  document.title = `selftrans · ${found[1] || "run"}`;
  window.scrollTo(0, 0);
  found[2](main, { rest, query: new URLSearchParams(query || ""), signal: left.signal });
}

function theme() {
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const show = () => {
    const chosen = stored("theme", null) || (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = chosen;
    button.textContent = chosen === "dark" ? "☀" : "☾";
    button.setAttribute("aria-label", chosen === "dark" ? "light colours" : "dark colours");
  };
  button.addEventListener("click", () => { store("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark"); show(); });
  dark.addEventListener("change", show);
  show();
}

// pages learn of it by the event "job" of the document, see `onJob`
let running = false;
async function job() {
  const found = await get("/api/jobs");
  running = found?.state === "running";
  const place = document.getElementById("job");
  if (!running) place.replaceChildren();
  else {
    const share = found.total ? `${Math.floor((100 * found.done) / found.total)} %` : found.doing;
    place.replaceChildren(h("span", {}, `${share}${found.left ? `, ${duration(found.left)} left` : ""}`), cancel(found));
  }
  document.dispatchEvent(new CustomEvent("job", { detail: found }));
}
document.addEventListener("job-started", () => { running = true; job(); });

theme();
route();
addEventListener("hashchange", route);
repeat(job, () => (running ? 400 : 2500), new AbortController().signal);

// One chart as SVG: lines with bands, linear or logarithmic, a tip at the pointer, series that can be hidden.
import { h, short, store, stored } from "./dom.js";

const WIDE = { left: 66, right: 12, top: 8, bottom: 36 };

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((each) => each * power >= rough) || 10);
  const found = [];
  const first = Math.ceil(low / step);
  // at most so many: a step may be too small to change a very large number
  for (let i = 0; i <= 2 * count + 2 && (first + i) * step <= high + step * 1e-9; i += 1) found.push((first + i) * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  const span = Math.log10(high / low);
  const parts = span > 4 ? [1] : span > 1.2 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const part of parts) { const at = part * 10 ** power; if (at >= low * 0.999 && at <= high * 1.001) found.push(at); }
  }
  return found;
}

// series: [{name, x, y, low?, high?, colour?, points?, at?: the point that is larger}]; options: {title, xlabel, marks: [{x, text}], cursor, height, empty, log}
export class Chart {
  constructor(title, options = {}) {
    this.title = title;
    this.options = { height: 210, xlabel: "step", ...options };
    this.series = [];
    this.hidden = new Set();
    this.log = stored(`log ${title}`, this.options.log ?? false);
    this.toggle = h("button", { class: "small", type: "button", title: "scale of the values", onclick: () => {
      this.log = !this.log;
      store(`log ${title}`, this.log);
      this.draw();
    } });
    this.heading = h("h2", {}, title);
    this.plot = h("div");
    this.legend = h("div", { class: "legend" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.node = h("section", { class: "card chart" }, h("div", { class: "top" }, this.heading, this.toggle), this.plot, this.legend, this.tip);
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(this.plot);
  }

  show(series, options = {}) {
    const text = JSON.stringify([series, options]);
    if (text === this.shown) return;
    this.shown = text;
    this.series = series.filter((each) => each.x.length);
    Object.assign(this.options, options);
    this.draw();
  }

  draw() {
    const width = Math.floor(this.plot.clientWidth);
    if (width < 40) return;
    const { height } = this.options;
    const visible = this.series.filter((each) => !this.hidden.has(each.name));
    this.toggle.textContent = this.log ? "log" : "linear";
    this.toggle.setAttribute("aria-label", `scale of ${this.title}: ${this.log ? "logarithmic" : "linear"}`);
    this.drawLegend();
    const svg = h("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": this.described(visible) });
    this.plot.replaceChildren(svg);
    if (!visible.length) {
      svg.append(h("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, this.options.empty || "nothing to draw yet"));
      return;
    }
    const scale = this.scale = this.scales(visible, width, height);
    this.axes(svg, width, height);
    for (const mark of this.options.marks || []) {
      const at = scale.x(mark.x);
      svg.append(h("line", { class: "mark", x1: at, x2: at, y1: WIDE.top, y2: height - WIDE.bottom }));
    }
    for (const each of visible) this.line(svg, each);
    if (this.options.cursor !== undefined && this.options.cursor !== null) {
      const at = scale.x(this.options.cursor);
      svg.append(h("line", { class: "cursor", x1: at, x2: at, y1: WIDE.top, y2: height - WIDE.bottom }));
    }
    this.point = h("line", { class: "cursor", y1: WIDE.top, y2: height - WIDE.bottom, visibility: "hidden" });
    svg.append(this.point);
    svg.addEventListener("pointermove", (event) => this.over(event, visible, width));
    svg.addEventListener("pointerleave", () => this.away());
  }

  described(visible) {
    const ends = visible.map((each) => `${each.name} ${short(each.y[each.y.length - 1])}`);
    return `${this.title}: ${ends.join(", ") || "no values"}`;
  }

  scales(visible, width, height) {
    const drawn = (value) => Number.isFinite(value) && Math.abs(value) < 1e300 && (!this.log || value > 1e-300);
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const each of visible) {
      for (const at of each.x) { if (at < x0) x0 = at; if (at > x1) x1 = at; }
      for (const values of [each.y, each.points ? each.low : null, each.points ? each.high : null]) {
        for (const value of values || []) if (drawn(value)) { if (value < y0) y0 = value; if (value > y1) y1 = value; }
      }
    }
    if (!Number.isFinite(y0)) [y0, y1] = this.log ? [0.1, 1] : [0, 1];
    if (x0 === x1) { const beyond = Math.max(1, Math.abs(x0) * 1e-6); [x0, x1] = [x0 - beyond, x1 + beyond]; }
    const change = this.log ? Math.log10 : (value) => value;
    let [low, high] = [change(y0), change(y1)];
    const margin = (high - low) * 0.05 || Math.abs(high) * 0.05 || 0.5;
    [low, high] = [low - margin, high + margin];
    if (this.log) [low, high] = [Math.max(low, -300), Math.min(high, 300)];
    if (!this.log && y0 >= 0 && low < 0) low = 0;
    const [across, up] = [width - WIDE.left - WIDE.right, height - WIDE.top - WIDE.bottom];
    return {
      x0, x1, y0: this.log ? 10 ** low : low, y1: this.log ? 10 ** high : high,
      x: (value) => WIDE.left + ((value - x0) / (x1 - x0)) * across,
      y: (value) => height - WIDE.bottom - ((change(this.log && !drawn(value) ? y0 : value) - low) / (high - low)) * up,
    };
  }

  axes(svg, width, height) {
    const { scale } = this;
    let found = this.log ? logTicks(scale.y0, scale.y1) : ticks(scale.y0, scale.y1, 5);
    if (this.log && found.length < 2) found = ticks(scale.y0, scale.y1, 4).filter((at) => at > 0);
    let before = Infinity;
    for (const at of found) {
      const y = scale.y(at);
      if (before - y < 15) continue;
      before = y;
      svg.append(h("line", { class: "gridline", x1: WIDE.left, x2: width - WIDE.right, y1: y, y2: y }),
        h("text", { x: WIDE.left - 7, y: y + 4, "text-anchor": "end" }, short(at, 4)));
    }
    for (const at of ticks(scale.x0, scale.x1, Math.max(2, Math.floor(width / 90)))) {
      const [x, text] = [scale.x(at), Math.abs(at) >= 1e5 ? `${short(at / 1000)}k` : short(at, 6)];
      const edge = x > width - 30;
      svg.append(h("text", { x: edge ? width - 2 : x, y: height - 20, "text-anchor": edge ? "end" : "middle" }, text));
    }
    svg.append(h("text", { x: width - WIDE.right, y: height - 4, "text-anchor": "end" }, this.options.xlabel));
  }

  line(svg, each) {
    const { scale } = this;
    const path = (xs, ys, start) => xs.map((x, i) => `${i ? "L" : start}${scale.x(x).toFixed(1)} ${scale.y(ys[i]).toFixed(1)}`).join("");
    const colour = `c${this.colour(each)}`;
    if (each.low) {
      const clip = (values) => values.map((v) => Math.min(Math.max(v, scale.y0), scale.y1));
      const back = path([...each.x].reverse(), clip([...each.high].reverse()), "L");
      svg.append(h("path", { class: `band ${colour}`, d: `${path(each.x, clip(each.low), "M")}${back}Z` }));
    }
    svg.append(h("path", { class: `series ${colour} d${Math.floor((each.colour ?? this.series.indexOf(each)) / 8) % 3}`, d: path(each.x, each.y, "M") }));
    if (each.points || each.x.length === 1) {
      for (const [i, x] of each.x.entries()) svg.append(h("circle", { class: `point ${colour}`, cx: scale.x(x), cy: scale.y(each.y[i]), r: i === each.at ? 6.5 : 3.6 }));
    }
  }

  colour(each) {
    return (each.colour ?? this.series.indexOf(each)) % 8;
  }

  drawLegend() {
    const alone = this.series.length === 1 && this.series[0].name === this.title;
    const marked = this.options.marks?.length ? h("span", { class: "fine marks" }, h("i"), "updates skipped") : "";
    this.legend.replaceChildren(marked, ...(alone ? [] : this.series.map((each) => h("button", {
      type: "button", "aria-pressed": String(!this.hidden.has(each.name)),
      onclick: () => { if (!this.hidden.delete(each.name)) this.hidden.add(each.name); this.draw(); },
    }, h("i", { class: `swatch c${this.colour(each)}` }), each.name))));
  }

  over(event, visible, width) {
    const { scale } = this;
    const box = this.plot.getBoundingClientRect();
    const left = event.clientX - box.left;
    const wanted = scale.x0 + ((left - WIDE.left) / (width - WIDE.left - WIDE.right)) * (scale.x1 - scale.x0);
    const rows = visible.map((each) => {
      let [low, high] = [0, each.x.length - 1];
      while (high - low > 1) { const middle = (low + high) >> 1; if (each.x[middle] < wanted) low = middle; else high = middle; }
      const i = Math.abs(each.x[low] - wanted) < Math.abs(each.x[high] - wanted) ? low : high;
      return { each, i, x: each.x[i] };
    });
    const near = rows.reduce((a, b) => (Math.abs(a.x - wanted) <= Math.abs(b.x - wanted) ? a : b));
    const at = scale.x(near.x);
    this.point.setAttribute("x1", at);
    this.point.setAttribute("x2", at);
    this.point.setAttribute("visibility", "visible");
    const spread = (row) => (row.each.low ? ` (${short(row.each.low[row.i])} – ${short(row.each.high[row.i])})` : "");
    this.tip.replaceChildren(h("div", { class: "soft" }, `${this.options.xlabel} ${short(near.x, 7)}`),
      ...rows.map((row) => h("div", {}, h("i", { class: `swatch c${this.colour(row.each)}` }), row.each.name, h("b", {}, short(row.each.y[row.i], 4) + spread(row)))));
    this.tip.hidden = false;
    const inside = this.node.getBoundingClientRect();
    const place = box.left - inside.left + at;
    const flip = place > inside.width / 2;
    this.tip.style.left = flip ? "auto" : `${place + 12}px`;
    this.tip.style.right = flip ? `${inside.width - place + 12}px` : "auto";
    this.tip.style.top = `${box.top - inside.top + 10}px`;
  }

  away() {
    this.tip.hidden = true;
    this.point?.setAttribute("visibility", "hidden");
  }
}

export function sparkline(points) {
  if (points.length < 2) return null;
  const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
  const [x0, x1, y0, y1] = [xs[0], xs[xs.length - 1], Math.min(...ys), Math.max(...ys)];
  const d = points.map(([x, y], i) => `${i ? "L" : "M"}${(((x - x0) / (x1 - x0 || 1)) * 96).toFixed(1)} ${(24 - ((y - y0) / (y1 - y0 || 1)) * 22).toFixed(1)}`).join("");
  return h("svg", { class: "sparkline", viewBox: "0 0 96 26", preserveAspectRatio: "none", "aria-hidden": "true" }, h("path", { d }));
}

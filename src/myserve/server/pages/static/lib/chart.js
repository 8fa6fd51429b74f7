// A line chart of few series, drawn as SVG, with the same numbers as a table behind a switch.

import { freshId, h, s } from "./dom.js";

const WIDTH = 360, HEIGHT = 120, LEFT = 44, BOTTOM = 16;

/** A chart that is drawn anew by `update(times, series)`: series are {name, values}, with null where nothing is known. */
export class Chart {
  constructor(title, { unit = "", format = plain, floor = 1 } = {}) {
    Object.assign(this, { title, unit, format, floor });
    this.value = h("p", { class: "chart-value" }, "–");
    this.plot = h("div", { class: "chart-plot" });
    this.legend = h("p", { class: "chart-legend" });
    this.table = h("div", { class: "chart-table", tabindex: "0", role: "region", "aria-label": `${title}, as a table` });
    this.details = h("details", {}, h("summary", {}, "As a table"), this.table);
    this.details.addEventListener("toggle", () => this.fillTable());
    const id = freshId("chart");
    this.node = h("article", { class: "card chart", "aria-labelledby": id },
      h("h3", { id }, title, unit ? h("span", { class: "unit" }, ` ${unit}`) : null),
      this.value, this.plot, this.legend, this.details);
  }

  update(times, series) {
    Object.assign(this, { times, series });
    const last = series.map(({ values }) => values.at(-1));
    this.value.textContent = last.map(value => value === null || value === undefined ? "–" : this.format(value)).join(" · ");
    this.legend.replaceChildren(...(series.length > 1
      ? series.map(({ name }, at) => h("span", { class: `key key-${at}` }, name)) : []));
    this.plot.replaceChildren(this.draw());
    if (this.details.open) this.fillTable();
  }

  draw() {
    const all = this.series.flatMap(({ values }) => values).filter(value => value !== null);
    const top = niceTop(Math.max(this.floor, ...all));
    const span = Math.max(1, this.times.at(-1) - this.times[0]);
    const x = at => LEFT + (WIDTH - LEFT - 4) * (this.times[at] - this.times[0]) / span;
    const y = value => 6 + (HEIGHT - BOTTOM - 6) * (1 - value / top);
    const grid = [0, top / 2, top].map(value => [
      s("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value) }),
      s("text", { class: "tick", x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end" }, this.format(value)),
    ]);
    const lines = this.series.map(({ values }, at) => s("path", { class: `line line-${at}`, d: pathOf(values, x, y) }));
    const said = this.series.map(({ name, values }) => `${name} ${values.at(-1) === null ? "unknown" : this.format(values.at(-1))}`);
    return s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${this.title}: ${said.join(", ")}` },
      grid, lines, s("text", { class: "tick", x: LEFT, y: HEIGHT - 2 }, `${Math.round(span)} s ago`),
      s("text", { class: "tick", x: WIDTH, y: HEIGHT - 2, "text-anchor": "end" }, "now"));
  }

  fillTable() {
    if (!this.details.open || !this.times) return;
    const rows = this.times.map((time, at) => h("tr", {},
      h("th", { scope: "row" }, new Date(time * 1000).toLocaleTimeString()),
      this.series.map(({ values }) => h("td", {}, values[at] === null ? "–" : this.format(values[at])))));
    this.table.replaceChildren(h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Time"), this.series.map(({ name }) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.reverse())));
  }
}

function pathOf(values, x, y) {
  let path = "", drawing = false;
  values.forEach((value, at) => {
    if (value === null) { drawing = false; return; }
    path += `${drawing ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    drawing = true;
  });
  return path;
}

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map(each => each * power).find(each => each >= value * 0.999);
}

export const plain = value => value >= 1000 ? Math.round(value).toLocaleString("en-US")
  : Number.isInteger(value) ? String(value) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
export const share = value => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)}%`;
export const seconds = value => value >= 1 ? `${value.toFixed(2)} s` : value === 0 ? "0" : `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms`;

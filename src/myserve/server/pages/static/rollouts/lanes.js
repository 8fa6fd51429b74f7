// What stands beside a sample's tokens: the trainer's distance, the weights that made them, the experts that they went to.

import { h, s } from "../lib/dom.js";

const WIDTH = 900, HEIGHT = 90;

/** Differences of trainer and sampler, a bar a token, on a symmetric logarithmic scale. */
export function differenceLane(differences) {
  const floor = 1e-7, most = Math.max(floor * 10, ...differences.map(Math.abs));
  const tall = value => Math.abs(value) <= floor ? 0 : Math.log(Math.abs(value) / floor) / Math.log(most / floor);
  const middle = HEIGHT / 2, wide = WIDTH / differences.length;
  let path = "";
  differences.forEach((value, at) => {
    const height = Math.max(tall(value) * (middle - 8), value === 0 ? 0 : 1);
    path += `M${(at * wide).toFixed(2)} ${middle}v${(value > 0 ? -height : height).toFixed(1)}h${Math.max(0.4, wide - 0.3).toFixed(2)}V${middle}z`;
  });
  const mean = differences.reduce((sum, value) => sum + value, 0) / differences.length;
  const zero = differences.filter(value => value === 0).length;
  const told = `largest ${most.toExponential(1)}, mean ${mean.toExponential(1)}, equal bits at ${zero} of ${differences.length} tokens`;
  return h("div", { class: "lanes" }, h("p", { class: "lane-name" }, `Trainer − sampler (logprob, logarithmic): ${told}`),
    s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Trainer minus sampler: ${told}`, preserveAspectRatio: "none" },
      s("line", { x1: 0, x2: WIDTH, y1: middle, y2: middle, stroke: "var(--strong-line)" }), s("path", { d: path, fill: "var(--s1)" })));
}

/** The versions of the weights along the tokens. */
export function versionBand(sample) {
  const spans = sample.weight_version_spans ?? (sample.weight_version === undefined ? [] : [{ start: 0, end: sample.completion_len, weight_version: sample.weight_version }]);
  if (!spans.length) return null;
  return h("div", { class: "lanes" }, h("p", { class: "lane-name" }, "Weights"),
    h("div", { class: "band", role: "img", "aria-label": spans.map(span => `tokens ${span.start} to ${span.end} by weights ${span.weight_version}`).join(", ") },
      spans.map(span => h("span", { style: { flex: String(Math.max(1, span.end - span.start)) } }, `v${span.weight_version}`))));
}

/** How often each layer sent this sample's tokens to each expert: layers down, experts across. */
export function expertMap({ rows, layers, each }) {
  const counts = Array.from({ length: layers }, () => new Map());
  let experts = 0;
  for (const row of rows) {
    for (let at = 0; at < row.length; at++) {
      const layer = counts[Math.floor(at / each)];
      layer?.set(row[at], (layer.get(row[at]) ?? 0) + 1);
      experts = Math.max(experts, row[at] + 1);
    }
  }
  const most = Math.max(1, ...counts.flatMap(layer => [...layer.values()]));
  const cell = Math.max(3, Math.min(16, Math.floor(900 / experts)));
  const canvas = h("canvas", { width: experts * cell, height: layers * cell, role: "img", "aria-label": `Experts: ${layers} layers, ${experts} experts, at most ${most} tokens to one` });
  const ink = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  ink.fillStyle = style.getPropertyValue("--sunken");
  ink.fillRect(0, 0, canvas.width, canvas.height);
  ink.fillStyle = style.getPropertyValue("--s0");
  counts.forEach((layer, y) => layer.forEach((value, x) => {
    ink.globalAlpha = 0.12 + 0.88 * value / most;
    ink.fillRect(x * cell, y * cell, cell - 1, cell - 1);
  }));
  const used = counts.map((layer, at) => h("tr", {}, h("th", { scope: "row" }, `layer ${at}`), h("td", {}, String(layer.size)),
    h("td", {}, [...layer].sort((a, b) => b[1] - a[1]).slice(0, 4).map(([id, value]) => `${id} (${value})`).join(", "))));
  return h("div", { class: "lanes" }, h("p", { class: "lane-name" }, `Experts: a row a layer, a column an expert; ${experts} experts seen`),
    h("div", { class: "heat", tabindex: "0", role: "region", "aria-label": "Heat map of experts" }, canvas),
    h("details", {}, h("summary", { class: "hint" }, "As a table"), h("table", { class: "plain-table" },
      h("thead", {}, h("tr", {}, ["Layer", "Experts used", "Most used (tokens)"].map(name => h("th", { scope: "col" }, name)))), h("tbody", {}, used))));
}

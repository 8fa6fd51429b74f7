// Colours of tokens: eight steps from plain to dark orange, which differ in lightness and so for every eye.

import { h } from "./dom.js";

/** What a token can be coloured by: how a value becomes a step (0 plain, 7 strongest), and its legend. */
export const SCALES = {
  logprob: {
    name: "logprob", hint: "of the model's own distribution", value: entry => entry.logprob,
    edges: [-0.05, -0.25, -0.7, -1.5, -3, -5, -8], labels: edge => `${(100 * Math.exp(edge)).toPrecision(2)}%`,
    falls: true, unit: "probability below",
  },
  sampling: {
    name: "sampling logprob", hint: "of the distribution that was drawn from", value: entry => entry.sampling_logprob,
    edges: [-0.05, -0.25, -0.7, -1.5, -3, -5, -8], labels: edge => `${(100 * Math.exp(edge)).toPrecision(2)}%`,
    falls: true, unit: "probability below",
  },
  rank: {
    name: "rank", hint: "among all ids by the model's scores", value: entry => entry.rank,
    edges: [2, 3, 5, 10, 30, 100, 1000], labels: edge => String(edge), falls: false, unit: "rank from",
  },
  entropy: {
    name: "entropy", hint: "of the model's own distribution, nats", value: entry => entry.entropy,
    edges: [0.1, 0.5, 1, 1.5, 2.5, 4, 6], labels: edge => String(edge), falls: false, unit: "nats from",
  },
  difference: {
    name: "trainer − sampler", hint: "difference of the two logprobs", value: entry => entry.difference === undefined ? undefined : Math.abs(entry.difference),
    edges: [1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1], labels: edge => String(edge), falls: false, unit: "distance from",
  },
};

/** The step of one token; -1 where it has no such number. */
export function step(scale, entry) {
  const value = scale.value(entry);
  if (value === null || value === undefined) return -1;
  let at = 0;
  while (at < scale.edges.length && (scale.falls ? value < scale.edges[at] : value >= scale.edges[at])) at++;
  return at;
}

/** The legend of a scale. */
export function legend(scale) {
  return h("p", { class: "legend" },
    h("span", { class: "legend-name" }, `${scale.name}: ${scale.unit}`),
    h("span", { class: "legend-steps" },
      h("span", { class: "swatch", dataset: { step: "0" } }, "plain"),
      scale.edges.map((edge, at) => h("span", { class: "swatch", dataset: { step: String(at + 1) } }, scale.labels(edge)))));
}

// The waterfall of one token: a table of the likeliest through the stages, what each removed, and the race of the draw.

import { h } from "../lib/dom.js";
import { count, number, percent, quoted } from "../lib/tokens.js";

/** What each stage is called, and which of the request's parameters shape it. */
const STAGES = {
  raw: ["Model", []],
  constraints: ["Constraints", ["response_format", "regex", "choice", "grammar", "allowed_token_ids", "bad_words", "min_tokens"]],
  logit_bias: ["Bias", ["logit_bias"]],
  penalties: ["Penalties", ["repetition_penalty", "frequency_penalty", "presence_penalty"]],
  temperature: ["Temperature", ["temperature"]],
  top_k: ["Top-k", ["top_k"]],
  top_p: ["Top-p", ["top_p"]],
  min_p: ["Min-p", ["min_p"]],
  typical_p: ["Typical", ["typical_p"]],
  top_n_sigma: ["Top-nσ", ["top_n_sigma"]],
};
const SHORT = { repetition_penalty: "rep", frequency_penalty: "freq", presence_penalty: "pres" };
const FEW = 14;

/** The picture of `answer`, the route's; `request` is what was asked; `fork(token)` goes on with another token. */
export function drawWaterfall(answer, request, fork) {
  const race = answer.draw.kind === "race";
  const longest = Math.max(...answer.tokens.flatMap(token => token.probabilities.filter(each => each !== null)));
  const matters = token => token.token_id === answer.token_id || token.token_id === answer.draw.runner_up;
  const rows = answer.tokens.map((token, at) => row(token, answer, longest, race, fork, at >= FEW && !matters(token)));
  const isLong = rows.some(each => each.classList.contains("more"));
  const table = h("table", { class: "falls" },
    h("caption", { class: "visually-hidden" }, "Probabilities of the likeliest tokens after each stage, and their arrival in the race"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "falls-token" }, "Token"),
      answer.stages.map(stage => head(stage, request)), h("th", { scope: "col", class: "race" }, raceHead(answer)))),
    h("tbody", {}, rows), h("tfoot", {}, rest(answer, longest)));
  const toggle = isLong ? h("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: event => {
    const open = table.classList.toggle("all");
    event.target.setAttribute("aria-expanded", String(open));
    event.target.textContent = open ? "Show fewer" : `Show all ${answer.tokens.length} listed`;
  } }, `Show all ${answer.tokens.length} listed`) : null;
  return h("div", { class: "waterfall" }, h("p", { class: "waterfall-said" }, said(answer)),
    h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "Waterfall of the token" }, table), toggle);
}

function said(answer) {
  const last = answer.stages.at(-1), drawn = answer.tokens.find(token => token.token_id === answer.token_id);
  const left = `${count(last.num_tokens)} of ${count(answer.stages[0].num_tokens)} tokens could be drawn`;
  const margin = answer.draw.margin;
  const runner = answer.tokens.find(token => token.token_id === answer.draw.runner_up);
  const how = answer.draw.kind === "argmax"
    ? `the largest score wins${runner ? `, by ${number(margin)} before ${quoted(runner)}` : ""}`
    : runner ? `${quoted(drawn)} arrived first, ${margin < 100 ? margin.toPrecision(3) : Math.round(margin)} times as early as ${quoted(runner)}`
      : `${quoted(drawn)} was the only one left`;
  const same = answer.is_same === false ? " — another token than the recorded one" : "";
  return [h("strong", {}, quoted(drawn)), ` ${percent(Math.exp(answer.logprob))} of the model, drawn at ${percent(Math.exp(answer.sampling_logprob))}: ${left}; ${how}${same}.`];
}

function head(stage, request) {
  const [name, parameters] = STAGES[stage.name] ?? [stage.name, []];
  const set = parameters.filter(parameter => request[parameter] !== undefined)
    .map(parameter => `${SHORT[parameter] ? `${SHORT[parameter]} ` : ""}${shortValue(request[parameter])}`).join(", ");
  const kept = 1 - stage.removed_mass;
  return h("th", { scope: "col" },
    h("span", { class: "stage-name" }, name, set ? h("span", { class: "stage-set" }, ` ${set}`) : null),
    h("span", { class: "stage-mass", "aria-hidden": "true" }, h("span", { style: { width: `${100 * kept}%` } })),
    h("span", { class: "stage-facts" }, stage.num_removed
      ? `−${count(stage.num_removed)} tokens, −${percent(stage.removed_mass)}`
      : stage.name === "raw" ? `${count(stage.num_tokens)} tokens` : "reshapes"),
    h("span", { class: "stage-facts" }, `entropy ${number(stage.entropy, 2)}`));
}

function shortValue(value) {
  const text = typeof value === "object" ? "" : String(value);
  return text.length > 8 ? `${text.slice(0, 7)}…` : text;
}

function raceHead(answer) {
  return [h("span", { class: "stage-name" }, answer.draw.kind === "race" ? "The race" : "Argmax"),
    h("span", { class: "stage-facts" }, answer.draw.kind === "race" ? "noise ÷ weight, first wins" : "no randomness"),
    h("span", { class: "stage-facts" }, answer.draw.kind === "race" ? "logarithmic" : "")];
}

function row(token, answer, longest, race, fork, more) {
  const isDrawn = token.token_id === answer.token_id;
  const cells = token.probabilities.map((probability, stage) => {
    if (probability !== null) return h("td", {}, bar(probability, longest));
    const here = answer.stages[stage].name === token.removed_by;
    return h("td", { class: here ? "gone here" : "gone" }, here ? [h("span", { "aria-hidden": "true" }, "✕"), h("span", { class: "gone-word" }, " removed")]
      : h("span", { class: "visually-hidden" }, "removed before"));
  });
  return h("tr", { class: `${isDrawn ? "drawn" : ""}${more ? " more" : ""}`, dataset: { token: token.token_id } },
    h("th", { scope: "row", class: "falls-token" },
      isDrawn ? h("span", { class: "star", "aria-label": "drawn" }, "★") : null,
      fork && !isDrawn ? h("button", { type: "button", class: "token-link mono", title: "Go on with this token", onclick: () => fork(token) }, quoted(token))
        : h("span", { class: "mono" }, quoted(token)),
      h("span", { class: "rank" }, ` #${token.rank}`)),
    cells, h("td", { class: "race" }, race ? lane(token, answer) : isDrawn ? "first" : ""));
}

/** A bar, as long as the likeliest of all is full. */
function bar(probability, longest) {
  return [h("span", { class: "track", "aria-hidden": "true" }, h("span", { class: "amount", style: { width: `${Math.min(100, 100 * probability / longest)}%` } })), h("span", { class: "bar-text" }, percent(probability))];
}

function lane(token, answer) {
  if (token.arrival === null) return token.removed_by ? "" : h("span", { class: "late" }, "later");
  const times = answer.tokens.map(each => each.arrival).filter(each => each !== null);
  const low = Math.log(Math.min(...times)), span = Math.max(1e-9, Math.log(Math.max(...times)) - low);
  const place = 100 * (Math.log(token.arrival) - low) / span;
  return [h("span", { class: "lane", "aria-hidden": "true" }, h("span", { class: "dot", style: { left: `${place}%` } })),
    h("span", { class: "bar-text", title: `noise ${token.noise.toPrecision(6)}` }, token.arrival.toPrecision(3))];
}

function rest(answer, longest) {
  return h("tr", {}, h("th", { scope: "row", class: "falls-token" }, "all others"),
    answer.stages.map(stage => h("td", {}, stage.rest_tokens ? [bar(stage.rest_mass, longest), h("span", { class: "stage-facts" }, `${count(stage.rest_tokens)} tokens`)] : "–")),
    h("td", { class: "race" }, ""));
}

// One recorded sample: its prompt, its tokens, and what stands beside them.

import { post } from "../lib/api.js";
import { button, h } from "../lib/dom.js";
import { SCALES, legend } from "../lib/scale.js";
import { number, quoted } from "../lib/tokens.js";
import { Strip } from "../playground/strip.js";
import { routingOf } from "./journal.js";
import { differenceLane, expertMap, versionBand } from "./lanes.js";

/** The detail of one entry of a journal. `model` tells the texts of ids. */
export async function drawSample(entry, model) {
  const { sample } = entry;
  const texts = await textsOf(sample, model);
  const entries = entriesOf(entry, texts.tokens);
  const differences = entries.map(token => token.difference).filter(value => value !== undefined);
  const routing = routingOf(sample);
  const chosen = h("p", { class: "hint", "aria-live": "polite" }, "Choose a token for its numbers.");
  const scale = differences.length ? "difference" : "logprob";
  const strip = new Strip({ label: "Tokens of the sample", scale, choose: at => { chosen.textContent = told(entries[at], at); } });
  strip.append(entries);
  const legendPlace = h("div", {}, legend(SCALES[scale]));
  const select = h("select", { "aria-label": "Colour tokens by", onchange: event => {
    strip.setScale(event.target.value);
    legendPlace.replaceChildren(legend(SCALES[event.target.value]));
  } }, ["logprob", "sampling", "difference"].filter(name => name !== "difference" || differences.length)
    .map(name => h("option", { value: name, selected: name === scale }, SCALES[name].name)));
  return h("article", { class: "card roll-detail" },
    h("div", { class: "row" }, h("h2", {}, `Sample ${entry.index} of ${entry.key.slice(0, 12)}`),
      button("Score again", event => scoreAgain(entry, model, event.target), { title: "Score these ids on this server, and compare the logprobs" })),
    h("p", { class: "hint" }, factsOf(entry)),
    texts.problem ? h("p", { class: "notice" }, texts.problem) : null,
    h("div", {}, h("h3", {}, "Prompt"), h("div", { class: "prompt-shown", tabindex: "0" }, entry.prompt ?? texts.prompt)),
    h("div", { class: "row left" }, h("h3", {}, "Tokens"), h("label", { class: "inline" }, "Colour by ", select), legendPlace),
    strip.node, chosen, versionBand(sample), differences.length ? differenceLane(differences) : null, routing ? expertMap(routing) : null);
}

function factsOf({ sample, reward }) {
  const facts = [`${sample.prompt_len} + ${sample.completion_len} tokens`, sample.finish_reason, `seed ${sample.seed ?? "unknown"}`, `${sample.attempts ?? 1} attempt${sample.attempts > 1 ? "s" : ""}`];
  if (typeof reward === "number") facts.unshift(`reward ${reward}`);
  return facts.join(" · ");
}

function told(entry, at) {
  const parts = [`token ${at}: ${quoted(entry)}`, `id ${entry.token_id}`, `logprob ${number(entry.logprob, 6)}`, `sampling ${number(entry.sampling_logprob, 6)}`];
  if (entry.difference !== undefined) parts.push(`trainer − sampler ${entry.difference.toExponential(3)}`);
  return parts.join(" · ");
}

/** The texts of a sample's ids, by the server's tokenizer; ids stand for them where it has another. */
async function textsOf(sample, model) {
  const completion = sample.full_tokens.slice(sample.prompt_len);
  try {
    const answer = await post("detokenize", { model, tokens: completion, return_tokens: true });
    const prompt = await post("detokenize", { model, tokens: sample.full_tokens.slice(0, sample.prompt_len) });
    return { tokens: answer.tokens, prompt: prompt.prompt };
  } catch (error) {
    const tokens = completion.map(id => ({ token: `id ${id}`, bytes: null }));
    return { tokens, prompt: sample.full_tokens.slice(0, sample.prompt_len).join(" "), problem: `The texts of tokens are not known here (${error.message}); their ids are shown.` };
  }
}

function entriesOf(entry, tokens) {
  const { sample } = entry;
  const ids = sample.full_tokens.slice(sample.prompt_len);
  const tail = list => list?.slice(-ids.length);
  const logprobs = tail(sample.inference_logprobs), tops = tail(sample.top_logprobs), sampling = sample.sampling_logprobs;
  return ids.map((id, at) => ({
    ...tokens[at], token_id: id, logprob: logprobs?.[at], sampling_logprob: sampling?.[at],
    difference: entry.trainer_logprobs && logprobs ? entry.trainer_logprobs[at] - logprobs[at] : undefined,
    // [id, logprob, text] as the journal has them
    top_logprobs: (tops?.[at] ?? []).map(([token_id, logprob, token]) => ({ token_id, logprob, token, bytes: [...new TextEncoder().encode(token ?? "")] })),
  }));
}

/** Score the recorded ids on this server: equal logprobs, bit for bit, or the first place that differs. */
async function scoreAgain(entry, model, where) {
  const { sample } = entry;
  where.disabled = true;
  try {
    const answer = await post("v1/completions", { model, prompt: sample.full_tokens, max_tokens: 0, echo: true, logprobs: true });
    const rows = answer.choices[0].logprobs.content.slice(sample.prompt_len);
    const recorded = sample.inference_logprobs?.slice(-sample.completion_len) ?? [];
    const at = rows.findIndex((row, i) => Math.fround(row.logprob) !== Math.fround(recorded[i]));
    where.textContent = !recorded.length ? "No logprobs were recorded" : at < 0 ? "Logprobs are identical"
      : `Token ${at} differs by ${(rows[at].logprob - recorded[at]).toExponential(2)}`;
  } catch (error) {
    where.textContent = error.message;
  }
}

// The panel of the chosen token: its numbers, its alternatives to go on from, and its waterfall.

import { post } from "../lib/api.js";
import { button, freshId, h } from "../lib/dom.js";
import { Raw } from "../lib/json.js";
import { hex, number, percent, quoted } from "../lib/tokens.js";
import { drawWaterfall } from "./waterfall.js";

/** The request of the waterfall route for one token of a sample. */
export function waterfallRequest(sample, at, top = 12) {
  const ids = sample.entries.slice(0, at + 1).map(entry => entry.token_id);
  return { [sample.kind]: { ...sample.request, seed: undefined }, seed: new Raw(sample.seed), choice: sample.index, completion_token_ids: ids, position: at, top };
}

export class TokenPanel {
  /** `fork(sample, at, alternative)` goes on with another token; `retemper(sample, temperature)` draws again with the same seed. */
  constructor({ fork, retemper }) {
    Object.assign(this, { fork, retemper, asked: 0 });
    this.node = h("section", { class: "card token-panel", "aria-label": "The chosen token", hidden: true });
  }

  hide() {
    this.node.hidden = true;
    this.asked++;
  }

  show(sample, at) {
    const entry = sample.entries[at];
    const waterfall = h("div", { class: "waterfall-place", "aria-live": "polite" }, h("p", { class: "hint" }, "Drawing it again …"));
    this.node.hidden = false;
    this.node.replaceChildren(
      h("div", { class: "row" }, h("h2", {}, "Token ", h("span", { class: "mono" }, quoted(entry))),
        h("span", { class: "hint" }, `${at} of ${sample.label}`), button("Close", () => this.hide(), { class: "quiet" })),
      h("div", { class: "token-top" }, this.numbers(entry), this.alternatives(sample, at, entry), this.again(sample)),
      h("h3", {}, "How it was drawn"), waterfall);
    this.load(sample, at, waterfall);
  }

  numbers(entry) {
    const rows = [["id", entry.token_id], ["bytes", entry.bytes ? hex(entry.bytes) || "none" : "special: no text"], ["logprob", number(entry.logprob, 6)],
      ["sampling logprob", number(entry.sampling_logprob, 6)], ["rank", entry.rank ?? "–"], ["entropy (nats)", number(entry.entropy, 4)]];
    for (const { token_id, logprob } of entry.token_id_logprobs ?? []) rows.push([`logprob of id ${token_id}`, number(logprob, 6)]);
    return h("dl", { class: "facts" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "mono" }, String(value)))));
  }

  alternatives(sample, at, entry) {
    const others = (entry.top_logprobs ?? []).filter(other => other.token_id !== entry.token_id);
    if (!others.length) return h("p", { class: "hint" }, "No alternatives were asked for.");
    return h("div", {}, h("h3", {}, "Go on with another"), h("ul", { class: "alternatives" }, others.map(other => h("li", {},
      button("", () => this.fork(sample, at, other), { class: "alternative", "aria-label": `Fork with ${quoted(other)}, ${percent(Math.exp(other.logprob))}` })
    )).map((item, i) => {
      item.firstChild.append(h("span", { class: "mono" }, quoted(others[i])), h("span", { class: "chance" }, percent(Math.exp(others[i].logprob))));
      return item;
    })));
  }

  again(sample) {
    const id = freshId("temperature");
    const field = h("input", { id, type: "number", min: 0, max: 100, step: 0.1, value: "0.3" });
    return h("div", {}, h("h3", {}, "The same seed at another temperature"),
      h("div", { class: "row left" }, h("label", { for: id, class: "visually-hidden" }, "Temperature"), field, button("Draw", () => this.retemper(sample, Number(field.value)))));
  }

  async load(sample, at, place) {
    const turn = ++this.asked;
    try {
      const answer = await post("v1/waterfall", waterfallRequest(sample, at));
      if (turn !== this.asked) return;
      const fork = token => this.fork(sample, at, { token_id: token.token_id, token: token.token, bytes: token.bytes, logprob: Math.log(token.probabilities[0]) });
      place.replaceChildren(drawWaterfall(answer, sample.request, fork));
    } catch (error) {
      if (turn === this.asked) place.replaceChildren(h("p", { class: "notice bad" }, error.message));
    }
  }
}

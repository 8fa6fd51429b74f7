// The playground: a request, its samples side by side, the chosen token, the tree of branches, and the request as code.

import { announce, button, copy, h } from "../lib/dom.js";
import { readHash, writeHash } from "../lib/hash.js";
import { SCALES, legend } from "../lib/scale.js";
import { quoted, textOf } from "../lib/tokens.js";
import { makeForm, makePrompt } from "./form.js";
import { START, codeOf } from "./request.js";
import { fork, partsAt, run } from "./run.js";
import { Strip } from "./strip.js";
import { TokenPanel } from "./token.js";

export async function start(root, shell) {
  const state = structuredClone(START);
  state.model = shell.model;
  const view = new Playground(root, shell, state);
  await view.build();
  return view;
}

class Playground {
  constructor(root, shell, state) {
    Object.assign(this, { root, shell, state, samples: [], cards: new Map(), running: null });
  }

  async build() {
    const changed = () => this.changed();
    this.form = await makeForm(this.state, changed);
    this.prompt = makePrompt(this.state, changed);
    this.runButton = h("button", { type: "submit", class: "primary" }, "Run");
    this.stopButton = button("Stop", () => this.running?.abort(), { disabled: true });
    this.facts = h("p", { class: "facts-line", role: "status" });
    this.problem = h("p", { class: "notice bad", role: "alert", hidden: true });
    this.scale = h("select", { "aria-label": "Colour tokens by", onchange: event => this.setScale(event.target.value) },
      Object.entries(SCALES).filter(([name]) => name !== "difference").map(([name, { name: told }]) => h("option", { value: name }, told)));
    this.legend = h("div", { class: "legend-place" });
    this.outputs = h("div", { class: "samples" });
    this.tree = h("nav", { class: "card tree", "aria-label": "Branches", hidden: true });
    this.panel = new TokenPanel({ fork: (...what) => this.branch(...what), retemper: (...what) => this.retemper(...what) });
    this.code = h("div", { class: "code" });
    this.root.replaceChildren(h("form", { class: "playground", onsubmit: event => { event.preventDefault(); this.run(); } },
      h("aside", { class: "side", "aria-label": "Parameters" }, h("h2", {}, "Parameters"), this.form.node),
      h("div", { class: "work" },
        h("div", { class: "card" }, this.prompt.node, h("div", { class: "row left" }, this.runButton, this.stopButton, h("span", { class: "hint" }, "Ctrl+Enter runs"), this.facts), this.problem),
        h("div", { class: "row left strip-bar" }, h("label", { class: "inline" }, "Colour by ", this.scale), this.legend),
        this.outputs, this.panel.node, this.tree, this.codeCard())));
    this.root.addEventListener("keydown", event => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.run(); }
    });
    document.getElementById("model").addEventListener("change", () => { this.state.model = this.shell.model; this.changed(); });
    this.drawLegend();
    this.drawCode();
  }

  /** Take the state of a link; null leaves what there is. */
  restore(state) {
    if (state === null || JSON.stringify(state) === JSON.stringify(this.state)) return;
    for (const key of Object.keys(START)) {
      const given = state[key];
      const fits = typeof given === typeof START[key] && given !== null && Array.isArray(given) === Array.isArray(START[key]);
      this.state[key] = fits ? given : structuredClone(START[key]);
    }
    this.state.model ||= this.shell.model;
    this.shell.model = this.state.model;
    this.scale.value = this.state.scale in SCALES ? this.state.scale : "logprob";
    this.form.draw();
    this.prompt.draw();
    this.drawLegend();
    this.drawCode();
  }

  visible(isVisible) {
    this.isVisible = isVisible;
    if (isVisible && !readHash().state) writeHash("playground", this.state);
  }

  changed() {
    if (this.isVisible) writeHash("playground", this.state);
    this.drawCode();
  }

  async run() {
    this.running?.abort();
    const seed = this.state.freshSeed ? "" : this.state.params.seed ?? "";
    const control = this.running = new AbortController();
    this.clear();
    try {
      const { freshSeed, params } = this.state;
      const asked = freshSeed ? { ...this.state, params: { ...params, seed: undefined } } : this.state;
      const { samples, done } = run(asked, seed, (sample, entries) => this.grew(sample, entries), control.signal);
      for (const sample of samples) this.addCard(sample);
      await this.until(done, control);
    } catch (error) {
      this.fail(error);
    }
    if (this.running === control) this.running = null;
  }

  async until(done, control) {
    this.busy(true);
    try {
      const usage = await done;
      if (usage) this.facts.textContent = `${usage.prompt_tokens} + ${usage.completion_tokens} tokens, ${usage.prompt_tokens_details?.cached_tokens ?? 0} from the cache`;
      announce("Done");
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      this.facts.textContent = "Stopped";
    } finally {
      // not with the next frame, as while tokens come: who waits for the end sees all of them, also in a tab without frames
      for (const { strip } of this.cards.values()) strip.draw();
      this.compare();
      if (this.running === control) this.busy(false);
    }
  }

  busy(isBusy) {
    this.runButton.textContent = isBusy ? "Run anew" : "Run";
    this.stopButton.disabled = !isBusy;
    this.outputs.setAttribute("aria-busy", String(isBusy));
  }

  fail(error) {
    this.problem.hidden = false;
    this.problem.textContent = error.message;
  }

  clear() {
    this.samples = [];
    this.cards.clear();
    this.outputs.replaceChildren();
    this.panel.hide();
    this.tree.hidden = true;
    this.problem.hidden = true;
    this.facts.textContent = "";
  }

  addCard(sample) {
    this.samples.push(sample);
    const strip = new Strip({ label: `Tokens of ${sample.label}`, scale: this.state.scale, choose: at => this.choose(sample, at) });
    const facts = h("p", { class: "sample-facts" });
    const parts = h("p", { class: "sample-parts" });
    const card = h("article", { class: "card sample", id: `sample-${sample.id}`, tabindex: "-1", "aria-label": sample.label },
      h("div", { class: "row" }, h("h3", {}, sample.label), button("Copy text", event => copy(textOf(sample.entries), event.target), { class: "quiet" })),
      strip.node, facts, parts);
    strip.append(sample.entries);
    strip.drawn = () => this.drawFacts(sample);
    this.cards.set(sample, { card, strip, facts, parts });
    this.outputs.append(card);
  }

  grew(sample, entries) {
    if (sample.seed !== null && this.state.params.seed !== sample.seed && !sample.parent) this.pinSeed(sample.seed);
    this.cards.get(sample)?.strip.append(entries);
  }

  /** The seed that was drawn becomes part of the address, so that the link draws the same sample. */
  pinSeed(seed) {
    this.state.params.seed = seed;
    const field = this.root.querySelector('[data-parameter="seed"]');
    if (field) field.value = seed;
    writeHash("playground", { ...this.state, freshSeed: false });
    this.drawCode();
  }

  drawFacts(sample) {
    const card = this.cards.get(sample);
    if (!card) return;
    const seconds = ((sample.ended ?? performance.now()) - sample.began) / 1000;
    const drawn = sample.entries.length - sample.prefix;
    const end = sample.finish ? `${sample.finish}${sample.stopReason === null ? "" : ` (${JSON.stringify(sample.stopReason)})`}` : "…";
    const prompt = sample.promptLogprob === null ? "" : ` · prompt logprob ${sample.promptLogprob.toFixed(2)}`;
    card.facts.textContent = `${drawn} tokens · ${end} · seed ${sample.seed ?? "…"} · ${seconds.toFixed(2)} s${sample.version === null ? "" : ` · weights ${sample.version}`}${prompt}`;
  }

  choose(sample, at) {
    for (const [other, { strip }] of this.cards) if (other !== sample) strip.unselect();
    if (sample.seed !== null) this.panel.show(sample, at);
  }

  branch(parent, at, alternative) {
    return this.goOn(parent, at, alternative, {}, `${quoted(alternative)} at ${at}`);
  }

  retemper(parent, temperature) {
    return this.goOn(parent, 0, null, { temperature }, `temperature ${temperature}`);
  }

  async goOn(parent, at, alternative, change, label) {
    const control = this.running ??= new AbortController();
    this.problem.hidden = true;
    try {
      const { sample, done } = at === 0 && !alternative
        ? fork(this.state, parent, 0, null, change, label, (one, entries) => this.grew(one, entries), control.signal)
        : fork(this.state, parent, at, alternative, change, label, (one, entries) => this.grew(one, entries), control.signal);
      this.addCard(sample);
      this.drawTree();
      this.cards.get(sample).card.scrollIntoView({ block: "nearest" });
      await this.until(done, control);
      this.drawFacts(sample);
    } catch (error) {
      this.fail(error);
    }
    if (this.running === control) { this.running = null; this.busy(false); }
  }

  /** Say of each sample where it parts from the first, or from the one that it branched from. */
  compare() {
    for (const [sample, { strip, parts }] of this.cards) {
      const other = sample.parent ?? (sample === this.samples[0] ? null : this.samples[0]);
      if (!other) continue;
      const at = partsAt(sample, other);
      strip.mark(at);
      parts.textContent = at === null ? `as ${other.label}, as far as both go`
        : `parts from ${other.label} at token ${at}: ${quoted(sample.entries[at])} instead of ${quoted(other.entries[at])}`;
    }
  }

  drawTree() {
    const children = parent => this.samples.filter(sample => sample.parent === parent);
    const item = sample => h("li", {}, button(sample.label, () => {
      const { card } = this.cards.get(sample);
      card.scrollIntoView({ block: "center" });
      card.focus({ preventScroll: true });
    }, { class: "quiet" }), children(sample).length ? h("ul", {}, children(sample).map(item)) : null);
    this.tree.hidden = false;
    this.tree.replaceChildren(h("h2", {}, "Branches"), h("ul", {}, children(null).map(item)));
  }

  setScale(name) {
    this.state.scale = name;
    for (const { strip } of this.cards.values()) strip.setScale(name);
    this.drawLegend();
    this.changed();
  }

  drawLegend() {
    this.legend.replaceChildren(legend(SCALES[this.state.scale] ?? SCALES.logprob));
  }

  codeCard() {
    return h("details", { class: "card code-card" }, h("summary", {}, "As code"), this.code);
  }

  drawCode() {
    const base = location.origin + location.pathname.replace(/\/$/, "");
    let codes;
    try {
      codes = codeOf(this.state, this.state.freshSeed ? "" : this.state.params.seed, base);
    } catch (error) {
      this.code.replaceChildren(h("p", { class: "notice bad" }, error.message));
      return;
    }
    const names = { curl: "curl", openai: "openai-python", sdk: "myserve SDK" };
    this.code.replaceChildren(...Object.entries(codes).map(([name, text]) => h("section", {},
      h("div", { class: "row" }, h("h3", {}, names[name]), button("Copy", event => copy(text, event.target), { class: "quiet" })),
      h("pre", { tabindex: "0", dataset: { code: name }, "aria-label": names[name] }, text))));
  }
}

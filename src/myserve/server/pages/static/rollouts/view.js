// Rollouts: an SDK journal is dropped here, and stays in this tab; its samples by prompt, each with its tokens.

import { announce, h } from "../lib/dom.js";
import { count, number } from "../lib/tokens.js";
import { VirtualList } from "../lib/virtual.js";
import { entryOf, readJournal } from "./journal.js";
import { drawSample } from "./sample.js";

const ORDERS = {
  file: ["as written", null],
  reward: ["lowest reward first", (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity)],
  mean: ["most surprising first", (a, b) => (a.mean ?? 0) - (b.mean ?? 0)],
  mismatch: ["largest mismatch first", (a, b) => (b.mismatch ?? -1) - (a.mismatch ?? -1)],
  length: ["longest first", (a, b) => b.length - a.length],
};

export async function start(root, shell) {
  const view = new Rollouts(root, shell);
  view.build();
  return view;
}

class Rollouts {
  constructor(root, shell) {
    Object.assign(this, { root, shell, journal: null, rows: [], order: "file", wanted: "", turn: 0 });
  }

  build() {
    this.file = h("input", { type: "file", accept: ".jsonl,.json,.journal", "aria-label": "A journal", onchange: event => this.open(event.target.files[0]) });
    this.progress = h("p", { class: "hint", role: "status" });
    this.drop = h("div", { class: "drop" }, h("h2", {}, "Drop a journal of the SDK"),
      h("p", { class: "hint" }, "The JSONL file that a sampler writes. It is read in this tab and sent nowhere; the server is asked for texts of token ids alone."), this.file, this.progress);
    for (const kind of ["dragenter", "dragover"]) this.root.addEventListener(kind, event => { event.preventDefault(); this.drop.classList.add("over"); });
    for (const kind of ["dragleave", "drop"]) this.root.addEventListener(kind, () => this.drop.classList.remove("over"));
    this.root.addEventListener("drop", event => { event.preventDefault(); this.open(event.dataTransfer.files[0]); });
    this.list = new VirtualList({ height: 46, label: "Samples", draw: index => this.row(index), choose: index => this.show(index) });
    this.list.node.id = "samples";
    this.summary = h("p", { class: "hint" });
    this.detail = h("div", { class: "roll-place" });
    const search = h("input", { type: "search", placeholder: "Text of a sample", "aria-label": "Find in texts", oninput: event => { this.wanted = event.target.value.toLowerCase(); this.arrange(); } });
    const order = h("select", { "aria-label": "Order of samples", onchange: event => { this.order = event.target.value; this.arrange(); } },
      Object.entries(ORDERS).map(([name, [told]]) => h("option", { value: name }, told)));
    this.place = h("div", { class: "roll", hidden: true },
      h("div", { class: "roll-list" }, h("div", { class: "roll-tools" }, search, order), this.summary, this.list.node), this.detail);
    this.root.replaceChildren(this.drop, this.place);
  }

  async open(file) {
    if (!file) return;
    const turn = ++this.turn;
    this.progress.textContent = "Reading …";
    try {
      const journal = await readJournal(file, (done, samples) => {
        if (turn === this.turn) this.progress.textContent = `${Math.round(100 * done)}%, ${count(samples)} samples`;
      });
      if (turn !== this.turn) return;
      this.journal = journal;
    } catch (error) {
      this.progress.textContent = error.message;
      return;
    }
    const damaged = this.journal.damaged ? `; ${this.journal.damaged} lines were damaged and are left out` : "";
    this.progress.textContent = `${file.name}: ${count(this.journal.samples.length)} samples of ${count(this.journal.groups.size)} prompts, run seed ${this.journal.runSeed}${damaged}`;
    announce(this.progress.textContent);
    this.place.hidden = false;
    this.drop.classList.add("loaded");
    this.arrange();
    if (this.rows.length > 1) this.list.select(1);
  }

  /** Lay the rows out: as written, a heading for each prompt and its samples; else the samples in their order. */
  arrange() {
    const compare = ORDERS[this.order][1];
    const found = sample => !this.wanted || sample.text.toLowerCase().includes(this.wanted);
    const samples = this.journal.samples.filter(found);
    if (compare) this.rows = samples.sort(compare).map(sample => ({ sample }));
    else {
      this.rows = [];
      for (const group of this.journal.groups.values()) {
        const members = group.members.filter(found);
        if (members.length) this.rows.push({ group }, ...members.map(sample => ({ sample })));
      }
    }
    const rewards = samples.map(({ reward }) => reward).filter(reward => reward !== null);
    this.summary.textContent = `${count(samples.length)} samples${rewards.length ? `, mean reward ${number(rewards.reduce((a, b) => a + b, 0) / rewards.length)}` : ""}`;
    this.list.chosen = -1;
    this.list.setLength(this.rows.length);
  }

  row(index) {
    const { group, sample } = this.rows[index];
    if (group) {
      const rewards = group.members.map(({ reward }) => reward).filter(reward => reward !== null);
      const mean = rewards.length ? `mean reward ${number(rewards.reduce((a, b) => a + b, 0) / rewards.length)}` : "";
      return h("div", { class: "head" }, h("span", { class: "roll-line" }, `Prompt ${group.at + 1}`),
        h("span", { class: "roll-sub" }, `${group.members.length} samples · ${group.key.slice(0, 16)}`), h("span", { class: "reward" }, mean));
    }
    const facts = [`#${sample.index}`, `${sample.length} tokens`, sample.finish, sample.mean === null ? null : `mean ${number(sample.mean, 2)}`,
      sample.mismatch === null ? null : `Δ ${sample.mismatch.toExponential(1)}`, sample.weights === null ? null : `v${sample.weights}`];
    return h("div", {}, h("span", { class: "roll-line" }, sample.text || "(no text)"),
      h("span", { class: "roll-sub" }, facts.filter(Boolean).join(" · ")), h("span", { class: "reward" }, sample.reward === null ? "" : `r ${number(sample.reward, 2)}`));
  }

  async show(index) {
    const { sample } = this.rows[index];
    if (!sample) return;
    const turn = ++this.turn;
    const entry = await entryOf(this.journal, sample);
    const drawn = await drawSample(entry, this.shell.model);
    if (turn === this.turn) this.detail.replaceChildren(drawn);
  }
}

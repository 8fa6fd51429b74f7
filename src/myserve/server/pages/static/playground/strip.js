// The token strip: each token a cell, coloured by one of its numbers; alternatives on hover and focus.

import { h, movedIndex, oncePerFrame } from "../lib/dom.js";
import { SCALES, step } from "../lib/scale.js";
import { number, percent, quoted, shown } from "../lib/tokens.js";

const BLOCK = 200; // tokens of a block, which is laid out only where it can be seen; it ends behind a line where it can
const LONGEST_BLOCK = 600;

/** The strip of one sample. `choose(index)` is told of the token that was chosen. */
export class Strip {
  constructor({ label, choose, scale = "logprob" }) {
    Object.assign(this, { choose, scale, entries: [], cells: [], chosen: -1, waiting: [] });
    this.node = h("div", { class: "strip", role: "listbox", "aria-label": label, tabindex: "0" });
    this.flush = oncePerFrame(() => this.draw());
    this.node.addEventListener("click", event => this.at(event, index => this.select(index)));
    this.node.addEventListener("pointerover", event => this.at(event, index => tip.show(this.cells[index], this.entries[index])));
    this.node.addEventListener("pointerleave", () => tip.hide());
    this.node.addEventListener("focusin", event => this.at(event, index => tip.show(this.cells[index], this.entries[index])));
    this.node.addEventListener("focusout", () => tip.hide());
    this.node.addEventListener("keydown", event => this.onKey(event));
    // the list itself is where the Tab key arrives, until one of its tokens has been focused
    this.node.addEventListener("focus", () => { if (this.cells.length) this.focus(Math.max(0, this.chosen)); });
  }

  /** Add tokens; they are drawn with the next frame, however many come until then. */
  append(entries) {
    this.waiting.push(...entries);
    this.flush();
  }

  draw() {
    const added = new Map();
    for (const entry of this.waiting.splice(0)) {
      const index = this.entries.push(entry) - 1;
      const last = this.block && this.entries[index - 1];
      const isFull = this.blockSize >= BLOCK && (shown(last).text.endsWith("\n") || this.blockSize >= LONGEST_BLOCK);
      if (!this.block || isFull) {
        this.block = h("div", { class: "strip-block", role: "group", "aria-label": `tokens from ${index}` });
        this.blockSize = 0;
        this.node.classList.toggle("long", this.node.childElementCount > 0);
        this.node.append(this.block);
      }
      this.blockSize++;
      const cell = this.cell(entry, index);
      this.cells.push(cell);
      if (!added.has(this.block)) added.set(this.block, []);
      added.get(this.block).push(cell);
    }
    for (const [block, cells] of added) block.append(...cells);
    this.drawn?.();
  }

  cell(entry, index) {
    const { text, kind } = shown(entry);
    const cell = h("span", { class: "tok", role: "option", tabindex: "-1", "aria-selected": "false",
      "aria-label": labelOf(entry), dataset: { index, kind, step: step(SCALES[this.scale], entry) } }, text);
    if (entry.forced) cell.dataset.forced = "";
    if (entry.kept) cell.dataset.kept = "";
    return cell;
  }

  /** Colour by another number. */
  setScale(name) {
    this.scale = name;
    this.cells.forEach((cell, index) => { cell.dataset.step = step(SCALES[name], this.entries[index]); });
  }

  /** Mark the token where this sample parts from another; null: none. */
  mark(index) {
    if (this.marked) delete this.marked.dataset.parts;
    this.marked = index === null ? undefined : this.cells[index];
    if (this.marked) this.marked.dataset.parts = "";
  }

  select(index) {
    this.unselect();
    this.chosen = index;
    this.cells[index].setAttribute("aria-selected", "true");
    this.focus(index);
    tip.hide(); // what it told is in the panel now
    this.choose(index);
  }

  unselect() {
    this.cells[this.chosen]?.setAttribute("aria-selected", "false");
    this.chosen = -1;
  }

  focus(index) {
    if (this.reachable !== undefined) this.cells[this.reachable].tabIndex = -1;
    this.node.tabIndex = -1;
    this.reachable = index;
    this.cells[index].tabIndex = 0;
    this.cells[index].focus({ preventScroll: false });
  }

  at(event, act) {
    const cell = event.target.closest(".tok");
    if (cell) act(Number(cell.dataset.index));
  }

  onKey(event) {
    const index = Number(document.activeElement?.dataset.index ?? -1);
    if (event.key === "Escape") tip.hide();
    if (index < 0) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.select(index);
      return;
    }
    const next = movedIndex(event, index, this.cells.length, 10);
    if (next === null) return;
    event.preventDefault();
    this.focus(next);
  }
}

function labelOf(entry) {
  const chance = entry.logprob === null || entry.logprob === undefined ? "" : `, ${percent(Math.exp(entry.logprob))}`;
  return `${quoted(entry)}${chance}${entry.forced ? ", forced" : ""}`;
}

/** The one floating card that shows a token's numbers and alternatives. */
const tip = {
  node: null,
  show(cell, entry) {
    this.node ??= document.body.appendChild(h("div", { class: "tip", role: "tooltip", id: "tip" }));
    const rows = (entry.top_logprobs ?? []).slice(0, 6).map(other => h("tr", { class: other.token_id === entry.token_id ? "drawn" : "" },
      h("td", { class: "mono" }, quoted(other)), h("td", {}, percent(Math.exp(other.logprob))),
      h("td", { class: "tip-bar" }, h("span", { style: { width: `${100 * Math.exp(other.logprob)}%` } }))));
    this.node.replaceChildren(
      h("p", { class: "tip-title" }, h("strong", { class: "mono" }, quoted(entry)), ` id ${entry.token_id}`),
      h("p", { class: "tip-facts" }, facts(entry)),
      rows.length ? h("table", {}, h("tbody", {}, rows)) : "");
    this.node.hidden = false;
    cell.setAttribute("aria-describedby", "tip");
    this.place(cell.getClientRects()[0] ?? cell.getBoundingClientRect());
  },
  place(box) {
    const { offsetWidth: width, offsetHeight: height } = this.node;
    const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
    const above = box.bottom + height + 10 > innerHeight;
    this.node.style.setProperty("left", `${left}px`);
    this.node.style.setProperty("top", `${above ? Math.max(8, box.top - height - 6) : box.bottom + 6}px`);
  },
  hide() {
    if (this.node) this.node.hidden = true;
  },
};

function facts(entry) {
  const parts = [];
  if (entry.forced) parts.push("forced, not drawn");
  if (entry.logprob !== null && entry.logprob !== undefined) parts.push(`logprob ${number(entry.logprob)}`);
  if (entry.sampling_logprob !== null && entry.sampling_logprob !== undefined) parts.push(`drawn at ${percent(Math.exp(entry.sampling_logprob))}`);
  if (entry.rank !== undefined) parts.push(`rank ${entry.rank}`);
  if (entry.entropy !== undefined) parts.push(`entropy ${number(entry.entropy, 2)}`);
  if (entry.difference !== undefined) parts.push(`trainer − sampler ${entry.difference.toExponential(2)}`);
  return parts.join(" · ");
}

addEventListener("scroll", () => tip.hide(), { passive: true, capture: true });

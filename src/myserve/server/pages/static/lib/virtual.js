// A list of any length: only the rows that can be seen are in the page.

import { h, movedIndex, oncePerFrame } from "./dom.js";

const SPARE = 8; // rows above and below what is seen

/** A listbox of `length` rows, each `height` pixels; `draw(index)` makes one, `choose(index)` is told of the chosen. */
export class VirtualList {
  constructor({ height, draw, choose, label }) {
    Object.assign(this, { height, draw, choose, length: 0, chosen: -1 });
    this.spacer = h("div", { class: "virtual-spacer", role: "presentation" });
    this.node = h("div", { class: "virtual", role: "listbox", tabindex: "0", "aria-label": label }, this.spacer);
    this.rows = new Map();
    const render = oncePerFrame(() => this.render());
    this.node.addEventListener("scroll", render, { passive: true });
    this.node.addEventListener("keydown", event => this.onKey(event));
    this.node.addEventListener("click", event => {
      const row = event.target.closest("[data-index]");
      if (row) this.select(Number(row.dataset.index));
    });
    new ResizeObserver(render).observe(this.node);
  }

  /** Show so many rows, anew. */
  setLength(length) {
    this.length = length;
    this.spacer.style.setProperty("height", `${length * this.height}px`);
    this.redraw();
  }

  redraw() {
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
    this.render();
  }

  render() {
    const first = Math.max(0, Math.floor(this.node.scrollTop / this.height) - SPARE);
    const last = Math.min(this.length, Math.ceil((this.node.scrollTop + this.node.clientHeight) / this.height) + SPARE);
    for (const [index, row] of this.rows) {
      if (index < first || index >= last) { row.remove(); this.rows.delete(index); }
    }
    for (let index = first; index < last; index++) {
      if (this.rows.has(index)) continue;
      const row = this.draw(index);
      row.id = `${this.node.id || "row"}-${index}`;
      row.setAttribute("role", "option");
      row.setAttribute("aria-setsize", this.length);
      row.setAttribute("aria-posinset", index + 1);
      row.setAttribute("aria-selected", index === this.chosen);
      row.dataset.index = index;
      row.style.setProperty("transform", `translateY(${index * this.height}px)`);
      this.rows.set(index, row);
      this.spacer.append(row);
    }
  }

  select(index) {
    this.rows.get(this.chosen)?.setAttribute("aria-selected", "false");
    this.chosen = index;
    const top = index * this.height, bottom = top + this.height;
    if (top < this.node.scrollTop) this.node.scrollTop = top;
    else if (bottom > this.node.scrollTop + this.node.clientHeight) this.node.scrollTop = bottom - this.node.clientHeight;
    this.render();
    this.rows.get(index)?.setAttribute("aria-selected", "true");
    this.node.setAttribute("aria-activedescendant", `${this.node.id || "row"}-${index}`);
    this.choose(index);
  }

  onKey(event) {
    const index = movedIndex(event, this.chosen, this.length);
    if (index === null || !this.length) return;
    event.preventDefault();
    this.select(Math.max(0, index));
  }
}

// Elements are made here and their text is set as text: nothing that a model says is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element. `on…` are listeners, `class`, `dataset` and `style` (a mapping) what they say; children are text or nodes. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "dataset") Object.assign(node.dataset, value);
    else if (name === "style") for (const [key, set] of Object.entries(value)) node.style.setProperty(key, set);
    else if (name === "value" || name === "checked") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(3).filter(child => child !== null && child !== undefined && child !== false));
  return node;
}

/** Make an SVG element of attributes and children. */
export function s(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.flat(3));
  return node;
}

export const byId = id => document.getElementById(id);

/** Tell people who hear the page what has changed. */
export function announce(text) {
  byId("status").textContent = text;
}

let counter = 0;
/** A fresh id, for a label and what it labels. */
export const freshId = prefix => `${prefix}-${++counter}`;

/** Have `run` called once before the next frame, however often it was asked for. */
export function oncePerFrame(run) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; run(); });
  };
}

/** A button with a handler. */
export function button(text, onclick, props = {}) {
  return h("button", { type: "button", onclick, ...props }, text);
}

/** Copy a text, and say so on the button. */
export async function copy(text, where) {
  const before = where.textContent;
  try {
    await navigator.clipboard.writeText(text);
    where.textContent = "Copied";
  } catch {
    where.textContent = "Select it and copy by hand";
  }
  setTimeout(() => { where.textContent = before; }, 1500);
}

/** Keys that move along a list: the index that they lead to, or null. */
export function movedIndex(event, index, length, step = 1) {
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: step, ArrowUp: -step, PageDown: 50, PageUp: -50 };
  if (event.key === "Home") return 0;
  if (event.key === "End") return length - 1;
  if (!(event.key in moves)) return null;
  return Math.min(length - 1, Math.max(0, index + moves[event.key]));
}

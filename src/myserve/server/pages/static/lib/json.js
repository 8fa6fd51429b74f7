// JSON with seeds of 64 bits: JavaScript's numbers have 53, so a seed is a text here and a number on the wire.

/** A number that is written as it stands. */
export class Raw {
  constructor(text) { this.text = text; }
}

/** A value as JSON; a `Raw` as its digits, what is undefined not at all. */
export function toJson(value, indent = 0, depth = 0) {
  if (value instanceof Raw) return value.text;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const inner = indent ? `\n${" ".repeat(indent * (depth + 1))}` : "";
  const outer = indent ? `\n${" ".repeat(indent * depth)}` : "";
  const items = Array.isArray(value)
    ? value.map(item => toJson(item, indent, depth + 1))
    : Object.entries(value).filter(([, item]) => item !== undefined)
      .map(([key, item]) => `${JSON.stringify(key)}:${indent ? " " : ""}${toJson(item, indent, depth + 1)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  if (!items.length) return open + close;
  const isFlat = Array.isArray(value) && value.every(item => typeof item !== "object");
  if (isFlat) return open + items.join(indent ? ", " : ",") + close;
  return open + inner + items.join("," + inner) + outer + close;
}

/** Parse an answer; seeds come as texts. Inside a string the quotes are escaped, so no text is taken for a seed. */
export function fromJson(text) {
  return JSON.parse(text.replace(/"(seed|run_seed)":\s*(-?\d+)/g, '"$1":"$2"'));
}

/** Whether a text is a seed: an integer of 64 bits. */
export function isSeed(text) {
  if (!/^-?\d{1,20}$/.test(text)) return false;
  const value = BigInt(text);
  return value >= -(2n ** 63n) && value < 2n ** 64n;
}

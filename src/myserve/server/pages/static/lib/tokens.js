// A token as people see it: its bytes as text, or as hex where they are part of a character; controls made visible.

const strict = new TextDecoder("utf-8", { fatal: true });

/** {text, kind}: kind is "text", "special", "bytes" (part of a character) or "space" (nothing but white space). */
export function shown(entry) {
  if (entry.bytes === null || entry.bytes === undefined) return { text: entry.token || "∅", kind: "special" };
  if (!entry.bytes.length) return { text: "∅", kind: "special" };
  let text;
  try {
    text = strict.decode(new Uint8Array(entry.bytes));
  } catch {
    return { text: hex(entry.bytes), kind: "bytes" };
  }
  return { text: visible(text), kind: text.trim() ? "text" : "space" };
}

/** Bytes as they are written: "F0 9F". */
export const hex = bytes => bytes.map(byte => byte.toString(16).padStart(2, "0").toUpperCase()).join(" ");

/** White space and control characters as signs; a line break keeps its break. */
function visible(text) {
  const signs = text.replaceAll("\r", "␍").replaceAll("\t", "⇥\t").replaceAll("\n", "↵\n")
    // eslint-disable-next-line no-control-regex
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, sign => String.fromCharCode(0x2400 + sign.charCodeAt(0)))
    .replace(/[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g, sign => `⟨U+${sign.charCodeAt(0).toString(16).toUpperCase()}⟩`);
  return /^ +$/.test(signs) ? "·".repeat(signs.length) : signs;
}

/** The text of entries, joined over their bytes: characters that are split come together. */
export function textOf(entries) {
  const decoder = new TextDecoder();
  return entries.map(entry => decoder.decode(new Uint8Array(entry.bytes ?? []), { stream: true })).join("") + decoder.decode();
}

/** A token in one line, in quotes: for labels and lists. */
export function quoted(entry) {
  const { text, kind } = shown(entry);
  if (kind === "special") return text;
  return kind === "bytes" ? `⟨${text}⟩` : `“${text.replaceAll("↵\n", "↵").replaceAll("⇥\t", "⇥")}”`;
}

const RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹";

/** A probability in words: three digits at most, and a power of ten where it is tiny. */
export function percent(p) {
  if (p === null || p === undefined) return "–";
  if (p === 0) return "0%";
  if (p >= 0.9995 && p < 1) return ">99.9%";
  if (p >= 0.00995) return `${(100 * p).toFixed(p === 1 ? 0 : 1)}%`;
  if (p >= 1e-6) return `${Number((100 * p).toPrecision(2))}%`;
  const power = Math.floor(Math.log10(100 * p));
  return `${Math.round(100 * p / 10 ** power)}·10⁻${[...String(-power)].map(digit => RAISED[digit]).join("")}%`;
}

export const number = (value, digits = 3) => value === null || value === undefined ? "–" : Number(value).toFixed(digits);

export const count = value => Number(value).toLocaleString("en-US");

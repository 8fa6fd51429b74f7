// Reads an SDK journal (JSONL) of any size: a summary of each sample is kept, and its line is read again when it is shown.

import { fromJson } from "../lib/json.js";

const TURN = 8; // milliseconds of parsing between two frames

/** Raised for a file that is not a journal. */
export class JournalError extends Error {}

/**
 * Read `file`; `progress(done, samples)` is called as it goes. Returns {runSeed, samples, groups, damaged}. A line is
 * {"key", "index", "sample"}, and may have "reward", "prompt" and "trainer_logprobs" beside them; or a note of a sample
 * before it, {"key", "index", "note": {"reward", "trainer_logprobs"}}.
 */
export async function readJournal(file, progress) {
  const journal = { file, runSeed: null, samples: [], groups: new Map(), damaged: 0 };
  let turn = performance.now();
  for await (const { line, start, end } of linesOf(file)) {
    await take(journal, line, start, end);
    if (performance.now() - turn > TURN) {
      progress(end / file.size, journal.samples.length);
      await new Promise(resolve => setTimeout(resolve));
      turn = performance.now();
    }
  }
  if (journal.runSeed === null) throw new JournalError(`${file.name} is empty: no journal`);
  return journal;
}

/** Yield each whole line as text with its place in the file in bytes; a last line that was cut is left out. */
async function* linesOf(file) {
  const reader = file.stream().getReader();
  const decoder = new TextDecoder();
  let rest = new Uint8Array(0), place = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    let buffer = value;
    if (rest.length) {
      buffer = new Uint8Array(rest.length + value.length);
      buffer.set(rest);
      buffer.set(value, rest.length);
    }
    let start = 0;
    for (let end = buffer.indexOf(10); end >= 0; end = buffer.indexOf(10, start)) {
      yield { line: decoder.decode(buffer.subarray(start, end)), start: place + start, end: place + end + 1 };
      start = end + 1;
    }
    rest = buffer.slice(start);
    place += start;
  }
}

async function take(journal, line, start, end) {
  let entry;
  try {
    entry = fromJson(line);
  } catch {
    entry = null;
  }
  if (journal.runSeed === null) {
    if (entry?.journal !== 1) throw new JournalError(`${journal.file.name} is not a journal of the SDK: its first line is another's`);
    journal.runSeed = entry.run_seed;
    return;
  }
  const sample = entry?.sample;
  if (entry?.note && !sample) {
    await takeNote(journal, entry);
    return;
  }
  if (!sample || typeof entry.key !== "string" || !Array.isArray(sample.full_tokens)) {
    journal.damaged++;
    return;
  }
  if (!journal.groups.has(entry.key)) journal.groups.set(entry.key, { key: entry.key, at: journal.groups.size, members: [] });
  const group = journal.groups.get(entry.key);
  const summary = summaryOf(entry, sample, start, end, group);
  group.members.push(summary);
  journal.samples.push(summary);
}

/** Add what a note tells to its sample; of several the last counts. */
async function takeNote(journal, { key, index, note }) {
  const summary = journal.groups.get(key)?.members.findLast(member => member.index === index);
  if (!summary) {
    journal.damaged++;
    return;
  }
  summary.note = { ...summary.note, ...note };
  if (typeof note.reward === "number") summary.reward = note.reward;
  if (Array.isArray(note.trainer_logprobs)) {
    const entry = await entryOf(journal, summary);
    summary.mismatch = mismatchOf(entry, entry.sample);
  }
}

function summaryOf(entry, sample, start, end, group) {
  const logprobs = sample.inference_logprobs?.slice(-sample.completion_len) ?? [];
  const reward = entry.reward ?? sample.reward ?? null;
  return {
    start, end, group, index: entry.index, reward: typeof reward === "number" ? reward : null, length: sample.completion_len, finish: sample.finish_reason,
    text: sample.text.slice(0, 160).replace(/\s+/g, " "), weights: sample.weight_version ?? null,
    mean: logprobs.length ? logprobs.reduce((sum, value) => sum + value, 0) / logprobs.length : null, mismatch: mismatchOf(entry, sample),
  };
}

/** The largest distance of trainer's and sampler's logprobs; null without the trainer's. */
function mismatchOf(entry, sample) {
  const trainer = entry.trainer_logprobs, sampler = sample.inference_logprobs?.slice(-sample.completion_len);
  if (!Array.isArray(trainer) || !sampler) return null;
  return trainer.reduce((most, value, at) => Math.max(most, Math.abs(value - sampler[at])), 0);
}

/** The whole entry of a summary, read from the file again, with what was noted of it. */
export async function entryOf(journal, { start, end, note }) {
  return { ...fromJson(await journal.file.slice(start, end).text()), ...note };
}

/** {rows, of}: expert ids of a sample as one array [tokens, layers, experts a token], flat; null where there are none. */
export function routingOf(sample) {
  const matrices = sample.routing_matrices, shape = sample.routing_shape;
  if (!matrices?.length || !shape) return null;
  const isWide = sample.routing_dtype === "uint16";
  const rows = matrices.slice(-sample.completion_len).map(text => {
    const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
    return isWide ? new Uint16Array(bytes.buffer) : bytes;
  });
  return { rows, layers: shape[0], each: shape[1] };
}

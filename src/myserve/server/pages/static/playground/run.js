// Draws samples: each has its tokens with their numbers, and what is needed to draw it, or go on from it, again.

import { stream } from "../lib/api.js";
import { Raw } from "../lib/json.js";
import { pathOf, reportsOf, requestOf } from "./request.js";

let made = 0;

function newSample(fields) {
  return { id: ++made, entries: [], promptIds: [], prefix: 0, seed: null, finish: null, stopReason: null, version: null, began: performance.now(),
    promptLogprob: null, ended: null, parent: null, ...fields };
}

/** Run the state's request; `grew(sample, entries)` is called as tokens come. Returns its samples, which fill up. */
export function run(state, seed, grew, signal) {
  const request = { ...requestOf(state), ...(seed ? { seed: new Raw(seed) } : {}) };
  const kind = state.mode === "chat" ? "chat" : "completion";
  const first = request.sample_index ?? 0;
  const samples = Array.from({ length: request.n ?? 1 }, (_, index) => newSample({ kind, request, index, label: `sample ${first + index}`, sampleIndex: first + index }));
  const done = read(pathOf(state), { ...request, ...reportsOf(state) }, samples, grew, signal);
  return { samples, done };
}

/**
 * Go on from a sample with another token at one place: its ids before the place are forced, and so is this one; seed, index and
 * parameters stay. `change` are parameters that are others from here on (a temperature).
 */
export function fork(state, parent, at, alternative, change, label, grew, signal) {
  const kept = parent.entries.slice(0, at);
  const forced = alternative ? [{ ...alternative, top_logprobs: [], forced: true, sampling_logprob: null }] : [];
  const entries = [...kept.map(entry => ({ ...entry, kept: true })), ...forced];
  const ids = entries.map(entry => entry.token_id);
  const request = { ...withoutChat(parent.request), ...change, n: 1, sample_index: parent.sampleIndex, seed: new Raw(parent.seed),
    prompt: parent.promptIds, max_tokens: parent.request.max_tokens ?? parent.request.max_completion_tokens ?? limitOf(parent) };
  const sample = newSample({ kind: "completion", request, index: 0, sampleIndex: parent.sampleIndex, seed: parent.seed, promptIds: parent.promptIds,
    entries, prefix: entries.length, parent, at, label });
  const asked = { ...request, ...reportsOf(state), prompt: [...parent.promptIds, ...ids], num_prior_tokens: ids.length, counts_prior_tokens: true };
  return { sample, done: read("v1/completions", asked, [sample], grew, signal) };
}

// a chat's default is the rest of the context, of which a branch takes a part; a completion's is 16
const limitOf = parent => parent.kind === "chat" ? parent.entries.length + 64 : 16;

function withoutChat(request) {
  const { messages, tools, tool_choice, continue_final_message, max_completion_tokens, ...rest } = request;
  return rest;
}

async function read(path, body, samples, grew, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  let usage = null;
  for await (const event of stream(path, asked, signal)) {
    usage = event.usage ?? usage;
    for (const choice of event.choices) take(samples[choice.index], choice, grew);
  }
  return usage;
}

function take(sample, choice, grew) {
  const entries = choice.logprobs?.content ?? [];
  if (choice.prompt_token_ids && !sample.parent) sample.promptIds = choice.prompt_token_ids;
  if (choice.seed !== undefined) sample.seed = String(choice.seed);
  if (choice.weight_version !== undefined) sample.version = choice.weight_version;
  if (choice.prompt_logprobs) {
    // by position: null for the first, then {id: {logprob}} with the token's own id among them
    sample.promptLogprob = choice.prompt_logprobs.reduce((sum, row, at) => sum + (row?.[sample.promptIds[at]]?.logprob ?? 0), 0);
  }
  sample.entries.push(...entries);
  if (choice.finish_reason) {
    sample.finish = choice.finish_reason;
    sample.stopReason = choice.stop_reason ?? null;
    sample.ended = performance.now();
  }
  grew(sample, entries);
}

/** The first place where two samples have other tokens; null where one is the beginning of the other, or they are equal. */
export function partsAt(one, other) {
  const length = Math.min(one.entries.length, other.entries.length);
  for (let at = 0; at < length; at++) if (one.entries[at].token_id !== other.entries[at].token_id) return at;
  return null;
}

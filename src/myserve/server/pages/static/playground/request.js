// From the state of the playground to the request that is sent, and to code that sends it.

import { Raw, isSeed, toJson } from "../lib/json.js";
import { GROUPS } from "./parameters.js";

export const START = {
  mode: "chat", model: "", messages: [{ role: "user", content: "Count to three:" }], prefill: "", prompt: "Count to three:",
  params: { max_tokens: "64" }, form: { kind: "none", text: "" }, tools: "", tool_choice: "", scale: "logprob", freshSeed: true,
};

/** What is wrong with a field of the state; the field is named. */
export class FieldError extends Error {
  constructor(field, message) {
    super(`${field}: ${message}`);
    this.field = field;
  }
}

function parsed(field, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new FieldError(field, `no JSON (${error.message})`);
  }
}

function idsOf(field, text) {
  const parts = text.split(/[\s,]+/).filter(Boolean);
  const wrong = parts.find(part => !/^\d+$/.test(part));
  if (wrong !== undefined) throw new FieldError(field, `${wrong} is no token id`);
  return parts.map(Number);
}

function valueOf(name, kind, text) {
  switch (kind) {
    case "flag": return text;
    case "choice": return text;
    case "lines": return text.split("\n").filter(line => line !== "").map(line => line.replaceAll("\\n", "\n"));
    case "ids": return idsOf(name, text);
    case "json": return parsed(name, text);
    case "seed":
      if (!isSeed(text)) throw new FieldError(name, "an integer of 64 bits");
      return new Raw(text);
    default:
      if (!Number.isFinite(Number(text))) throw new FieldError(name, `${text} is no number`);
      return Number(text);
  }
}

/** The request's own fields, those of reports and streaming left out. Raises FieldError. */
export function requestOf(state) {
  const body = { model: state.model };
  if (state.mode === "chat") {
    body.messages = state.messages.map(({ role, content }) => ({ role, content }));
    if (state.prefill) {
      body.messages.push({ role: "assistant", content: state.prefill });
      body.continue_final_message = true;
    }
    if (state.tools.trim()) {
      body.tools = parsed("tools", state.tools);
      if (state.tool_choice) body.tool_choice = toolChoice(state.tool_choice);
    }
  } else {
    body.prompt = promptOf(state);
  }
  for (const [, parameters] of GROUPS) {
    for (const [name, kind] of parameters) {
      const text = state.params[name];
      if (text === undefined || text === "" || REPORTED.has(name)) continue;
      body[name] = valueOf(name, kind, text);
    }
  }
  return { ...body, ...formOf(state.form) };
}

/** A raw prompt goes on with the prefill, if there is one; "ids: 1 2 3" is a prompt of ids. */
function promptOf({ prompt, prefill }) {
  const ids = /^ids:\s*([\d\s,]+)$/.exec(prompt);
  return ids ? idsOf("prompt", ids[1]) : prompt + prefill;
}

const toolChoice = text => ["auto", "none", "required"].includes(text) ? text : { type: "function", function: { name: text } };

function formOf({ kind, text }) {
  switch (kind) {
    case "json_object": return { response_format: { type: "json_object" } };
    case "json_schema": return { response_format: { type: "json_schema", json_schema: { name: "answer", schema: parsed("schema", text) } } };
    case "regex": case "grammar": return { [kind]: text };
    case "choice": return { choice: text.split("\n").filter(Boolean) };
    default: return {};
  }
}

// asked for by every run, so that the strip has its numbers
const REPORTED = new Set(["top_logprobs", "logprobs_mode", "logprob_token_ids", "prompt_logprobs"]);

/** The fields that ask for what the strip shows. */
export function reportsOf(state) {
  const asked = { logprobs: true, top_logprobs: 5, token_stats: true, return_token_ids: true };
  for (const [, parameters] of GROUPS) {
    for (const [name, kind] of parameters) {
      const text = state.params[name];
      if (REPORTED.has(name) && text !== undefined && text !== "") asked[name] = valueOf(name, kind, text);
    }
  }
  return asked;
}

export const pathOf = state => state.mode === "chat" ? "v1/chat/completions" : "v1/completions";

// ---- code to copy

const OPENAI = new Set(["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "tools", "tool_choice",
  "frequency_penalty", "presence_penalty", "logit_bias", "response_format", "logprobs", "top_logprobs"]);

/** {curl, openai, sdk}: the request as code; the key is the reader's own variable. */
export function codeOf(state, seed, base) {
  const body = { ...requestOf(state), ...(seed ? { seed: new Raw(seed) } : {}), logprobs: true, top_logprobs: 5 };
  return { curl: curl(state, body, base), openai: openai(state, body, base), sdk: sdk(state, body, base) };
}

function curl(state, body, base) {
  const json = toJson(body, 2).replaceAll("'", "'\\''");
  return `curl -s ${base}/${pathOf(state)} \\\n  -H "Authorization: Bearer $MYSERVE_API_KEY" -H 'content-type: application/json' -d '${json}'\n`;
}

function openai(state, body, base) {
  const own = Object.entries(body).filter(([name]) => OPENAI.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI.has(name)));
  const call = state.mode === "chat" ? "chat.completions" : "completions";
  if (state.mode !== "chat") {
    // its type has a number there, and no alternatives beside it
    own.splice(0, own.length, ...own.filter(([name]) => name !== "logprobs" && name !== "top_logprobs"), ["logprobs", 5]);
  }
  const lines = own.map(([name, value]) => `    ${name}=${python(value, 4)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra, 4)},`);
  const text = state.mode === "chat" ? "choice.message.content" : "choice.text";
  return `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${base}/v1", api_key=os.environ.get("MYSERVE_API_KEY", "none"))\n`
    + `answer = client.${call}.create(\n${lines.join("\n")}\n)\nfor choice in answer.choices:\n    print(${text})\n`;
}

function sdk(state, body, base) {
  const { model, messages, prompt, tool_choice, continue_final_message, ...rest } = body; // the last two are the chat route's
  if (continue_final_message) rest.chat_template_kwargs = { continue_final_message: true, add_generation_prompt: false };
  const options = Object.entries(rest).map(([name, value]) => `    ${name}=${python(value, 4)},`).join("\n");
  const isIds = Array.isArray(prompt);
  const load = isIds ? "from myserve.sdk import DeploymentSampler\n\ntokenizer = None\n"
    : 'from transformers import AutoTokenizer\n\nfrom myserve.sdk import DeploymentSampler\n\ntokenizer = AutoTokenizer.from_pretrained(os.environ["MYSERVE_TOKENIZER"])  # the model\'s folder or hub id\n';
  const asked = state.mode === "chat" ? `sample_with_tokens(\n    ${python(messages, 4)}`
    : `sample_with_prompt_tokens(\n    ${isIds ? python(prompt, 4) : `tokenizer.encode(${python(prompt, 4)})`}`;
  return `import os\n\n${load}sampler = DeploymentSampler(\n    "${base}", ${python(model)}, api_key=os.environ.get("MYSERVE_API_KEY", ""), tokenizer=tokenizer\n)\n`
    + `samples = sampler.sync.${asked},\n${options}\n)\nfor sample in samples:\n    print(repr(sample.text), sample.seed)\nsampler.sync.close()\n`;
}

/** A value as Python writes it. */
export function python(value, indent = 0) {
  if (value instanceof Raw) return value.text;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const pad = " ".repeat(indent + 4);
  const items = Array.isArray(value) ? value.map(item => python(item, indent + 4))
    : Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${python(item, indent + 4)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const line = open + items.join(", ") + close;
  return line.length < 80 ? line : `${open}\n${items.map(item => `${pad}${item},`).join("\n")}\n${" ".repeat(indent)}${close}`;
}

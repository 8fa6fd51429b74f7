// The sampling parameters that the playground offers: what each is called, what it does, and how it is typed.

/** Groups of [name, kind, default in words, hint, slider's top where it has one]. */
export const GROUPS = [
  ["Distribution", [
    ["temperature", "number", "1", "0 takes the likeliest; above 1 flattens", { low: 0, high: 2, step: 0.05 }],
    ["top_k", "integer", "off", "keep the k likeliest"],
    ["top_p", "number", "1", "keep the smallest set with this mass", { low: 0, high: 1, step: 0.01 }],
    ["min_p", "number", "0", "keep what is this likely, relative to the likeliest", { low: 0, high: 1, step: 0.01 }],
    ["typical_p", "number", "1", "keep what is about as surprising as the entropy", { low: 0.01, high: 1, step: 0.01 }],
    ["top_n_sigma", "number", "off", "keep logits within so many deviations of the largest"],
  ]],
  ["Length and end", [
    ["max_tokens", "integer", "chat: the context; raw: 16", "at most so many tokens"],
    ["min_tokens", "integer", "0", "no end before so many"],
    ["stop", "lines", "none", "strings that end the text, one a line"],
    ["stop_token_ids", "ids", "none", "ids that end it"],
    ["ignore_eos", "flag", "", "EOS is a token like any other"],
    ["include_stop_str_in_output", "flag", "", "the stop string stays in the text"],
    ["skip_special_tokens", "flag", "", "special tokens are left out of the text", { on: true }],
  ]],
  ["Draw", [
    ["seed", "seed", "a new one each run", "the same seed gives the same tokens"],
    ["n", "integer", "1", "samples side by side"],
    ["sample_index", "integer", "0", "the first sample's index under the seed"],
    ["noise", "choice", "counter", "counter: a pure function; torch: transformers' stream", ["counter", "torch"]],
  ]],
  ["Penalties and constraints", [
    ["repetition_penalty", "number", "1", "over prompt and completion", { low: 0.5, high: 2, step: 0.05 }],
    ["frequency_penalty", "number", "0", "times the count in the completion", { low: -2, high: 2, step: 0.1 }],
    ["presence_penalty", "number", "0", "once for what the completion has", { low: -2, high: 2, step: 0.1 }],
    ["logit_bias", "json", "none", '{"id": bias}, from −100 to 100'],
    ["allowed_token_ids", "ids", "all", "only these can be drawn"],
    ["bad_words", "lines", "none", "words that may not come, one a line"],
  ]],
  ["Reports", [
    ["top_logprobs", "integer", "5", "alternatives of each token"],
    ["logprobs_mode", "choice", "raw", "whose logprobs the alternatives have", ["raw", "processed"]],
    ["prompt_logprobs", "integer", "off", "score the prompt too, with so many alternatives"],
    ["logprob_token_ids", "ids", "none", "ids whose logprob every token has"],
  ]],
];

/** Forms that the text can be made to have: name and an example. */
export const FORMS = {
  none: "",
  json_object: "",
  json_schema: '{\n  "type": "object",\n  "properties": {"answer": {"type": "integer"}},\n  "required": ["answer"]\n}',
  regex: "[0-9]+",
  choice: "red\ngreen\nblue",
  grammar: 'root ::= "yes" | "no"',
};

export const EXAMPLE_TOOLS = `[{"type": "function", "function": {
  "name": "add", "description": "Add two integers.",
  "parameters": {"type": "object", "properties": {
    "a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}}]`;

// The playground's form: a control for every parameter, with its range from the server's own schema.

import { button, freshId, h } from "../lib/dom.js";
import { fieldsOf, shownRange } from "../lib/schema.js";
import { EXAMPLE_TOOLS, FORMS, GROUPS } from "./parameters.js";

const ROLES = ["system", "user", "assistant", "tool", "developer"];

/** The controls; `changed` is called after each change of `state`, which they write to. */
export async function makeForm(state, changed) {
  const fields = await fieldsOf("ChatCompletionRequest");
  const node = h("div", { class: "form" });
  const badges = GROUPS.map(([, parameters]) => ({ parameters, badge: h("span", { class: "badge" }) }));
  const told = () => {
    count(badges, state);
    changed();
  };
  const draw = () => {
    node.replaceChildren(
      ...GROUPS.map(([title, parameters], at) => h("details", { class: "group", open: (at === 0 || at === 2) && innerWidth > 900 },
        h("summary", {}, title, badges[at].badge),
        h("div", { class: "controls" }, parameters.map(parameter => control(parameter, fields, state, told))))),
      formGroup(state, changed), toolsGroup(state, changed));
    count(badges, state);
  };
  draw();
  return { node, draw };
}

/** How many parameters of each group are set. */
function count(badges, state) {
  for (const { parameters, badge } of badges) {
    const set = parameters.filter(([name]) => (state.params[name] ?? "") !== "").length;
    badge.textContent = set || "";
    badge.hidden = !set;
  }
}

function control([name, kind, fallback, hint, more], fields, state, changed) {
  const id = freshId(name), hintId = `${id}-hint`;
  const range = fields[name] ?? {};
  const set = value => {
    if (value === "" || value === undefined) delete state.params[name];
    else state.params[name] = value;
    changed();
  };
  const shared = { id, name, "aria-describedby": hintId, dataset: { parameter: name } };
  const hintNode = h("span", { class: "hint", id: hintId }, hint, shownRange(range) ? ` · ${shownRange(range)}` : "");
  if (kind === "flag") {
    const plain = more?.on ?? false;
    const box = h("input", { type: "checkbox", ...shared, checked: state.params[name] ?? plain,
      onchange: event => set(event.target.checked === plain ? undefined : event.target.checked) });
    return h("div", { class: "control flag" }, h("label", { for: id }, box, name), hintNode);
  }
  const label = h("label", { for: id }, name);
  const value = state.params[name] ?? "";
  if (kind === "choice") {
    return h("div", { class: "control" }, label, h("select", { ...shared, onchange: event => set(event.target.value) },
      ["", ...more].map(each => h("option", { value: each, selected: each === value }, each || `default (${fallback})`))), hintNode);
  }
  if (kind === "lines" || kind === "json") {
    return h("div", { class: "control wide" }, label,
      h("textarea", { ...shared, rows: 2, placeholder: fallback, spellcheck: "false", value, oninput: event => set(event.target.value) }), hintNode);
  }
  if (kind === "seed") return seedControl(label, shared, value, fallback, hintNode, state, set);
  const isNumber = kind === "number" || kind === "integer";
  const input = h("input", { ...shared, type: isNumber ? "number" : "text", placeholder: fallback, value,
    min: isNumber ? range.minimum ?? range.exclusiveMinimum : undefined, max: isNumber ? range.maximum : undefined,
    step: kind === "integer" ? 1 : "any", inputmode: kind === "ids" ? "numeric" : undefined,
    oninput: event => { set(event.target.value); if (slider) slider.value = event.target.value || fallback; } });
  const slider = more ? h("input", { type: "range", min: more.low, max: more.high, step: more.step, value: value || fallback, tabindex: "-1",
    "aria-label": `${name}, by slider`, oninput: event => { input.value = event.target.value; set(event.target.value); } }) : null;
  return h("div", { class: slider ? "control wide slid" : "control" }, label, h("div", { class: "slid-row" }, slider, input), hintNode);
}

function seedControl(label, shared, value, fallback, hintNode, state, set) {
  const input = h("input", { ...shared, type: "text", inputmode: "numeric", placeholder: fallback, value,
    oninput: event => { state.freshSeed = event.target.value === ""; box.checked = state.freshSeed; set(event.target.value.trim()); } });
  const box = h("input", { type: "checkbox", checked: state.freshSeed, onchange: event => { state.freshSeed = event.target.checked; set(input.value); } });
  return h("div", { class: "control wide" }, label, h("div", { class: "slid-row" }, input, h("label", { class: "inline" }, box, "new each run")), hintNode);
}

function formGroup(state, changed) {
  const id = freshId("form");
  const area = h("textarea", { rows: 4, spellcheck: "false", "aria-label": "What the form says", value: state.form.text, class: "code-input",
    hidden: !FORMS[state.form.kind], oninput: event => { state.form.text = event.target.value; changed(); } });
  const select = h("select", { id, onchange: event => {
    state.form = { kind: event.target.value, text: FORMS[event.target.value] };
    area.value = state.form.text;
    area.hidden = !state.form.text;
    changed();
  } }, Object.keys(FORMS).map(kind => h("option", { value: kind, selected: kind === state.form.kind }, kind === "none" ? "any text" : kind)));
  return h("details", { class: "group", open: state.form.kind !== "none" }, h("summary", {}, "Structured output"),
    h("div", { class: "controls" }, h("div", { class: "control wide" }, h("label", { for: id }, "form of the text"), select, area)));
}

function toolsGroup(state, changed) {
  const id = freshId("tools"), choiceId = freshId("choice");
  const area = h("textarea", { id, rows: 4, spellcheck: "false", class: "code-input", placeholder: "none", value: state.tools,
    oninput: event => { state.tools = event.target.value; changed(); } });
  const choice = h("input", { id: choiceId, type: "text", placeholder: "auto", value: state.tool_choice,
    oninput: event => { state.tool_choice = event.target.value.trim(); changed(); } });
  return h("details", { class: "group", open: Boolean(state.tools) }, h("summary", {}, "Tools (chat)"),
    h("div", { class: "controls" },
      h("div", { class: "control wide" }, h("label", { for: id }, "tools"), area,
        button("An example", () => { area.value = state.tools = EXAMPLE_TOOLS; changed(); }, { class: "quiet" })),
      h("div", { class: "control wide" }, h("label", { for: choiceId }, "tool_choice"), choice,
        h("span", { class: "hint" }, "auto, none, required, or a tool's name"))));
}

/** The prompt: messages of a chat, or one text; and the answer's beginning. */
export function makePrompt(state, changed) {
  const node = h("div", { class: "prompt" });
  const draw = () => {
    const isChat = state.mode === "chat";
    const modes = h("div", { class: "segmented", role: "group", "aria-label": "Kind of prompt" },
      [["chat", "Chat"], ["completion", "Raw text"]].map(([mode, name]) => button(name, () => {
        state.mode = mode;
        changed();
        draw();
      }, { "aria-pressed": String(state.mode === mode) })));
    const prefillId = freshId("prefill");
    node.replaceChildren(h("div", { class: "row" }, h("h2", {}, "Prompt"), modes),
      ...(isChat ? chatParts(state, changed, draw) : [h("textarea", { class: "prompt-text", rows: 5, "aria-label": "Prompt", value: state.prompt,
        oninput: event => { state.prompt = event.target.value; changed(); } }),
      h("p", { class: "hint" }, "“ids: 1 2 3” is a prompt of token ids")]),
      h("div", { class: "control wide" }, h("label", { for: prefillId }, "The answer begins with (prefill)"),
        h("textarea", { id: prefillId, rows: 1, value: state.prefill, placeholder: "nothing", oninput: event => { state.prefill = event.target.value; changed(); } })));
  };
  draw();
  return { node, draw };
}

function chatParts(state, changed, draw) {
  const messages = state.messages.map((message, at) => h("div", { class: "message", dataset: { role: message.role } },
    h("div", { class: "row" },
      h("select", { "aria-label": `Role of message ${at + 1}`, onchange: event => { message.role = event.target.value; changed(); draw(); } },
        ROLES.map(role => h("option", { value: role, selected: role === message.role }, role))),
      state.messages.length > 1 ? button("Remove", () => { state.messages.splice(at, 1); changed(); draw(); },
        { class: "quiet", "aria-label": `Remove message ${at + 1}` }) : null),
    h("textarea", { rows: 2, "aria-label": `Message ${at + 1}`, value: message.content, oninput: event => { message.content = event.target.value; changed(); } })));
  const add = button("Add a message", () => {
    state.messages.push({ role: state.messages.at(-1)?.role === "user" ? "assistant" : "user", content: "" });
    changed();
    draw();
  }, { class: "quiet" });
  return [...messages, add];
}

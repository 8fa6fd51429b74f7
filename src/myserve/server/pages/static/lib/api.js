// The server that this page came from, by its public API. A key is sent as a header and kept in the tab alone.

import { byId } from "./dom.js";
import { fromJson, toJson } from "./json.js";

const KEY = "myserve-api-key";

/** What the server said was wrong. */
export class ApiError extends Error {
  constructor(message, status, param) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

function headers() {
  const key = apiKey();
  return { ...(key ? { authorization: `Bearer ${key}` } : {}), "content-type": "application/json" };
}

let asking = null;
/** Ask for a key, once for all that wait for it. False: none was given. */
export function askForKey() {
  asking ??= new Promise(resolve => {
    const dialog = byId("key-dialog"), field = byId("key");
    field.value = apiKey();
    const done = given => {
      dialog.close();
      asking = null;
      resolve(given);
    };
    byId("key-form").onsubmit = event => {
      event.preventDefault();
      if (field.value) sessionStorage.setItem(KEY, field.value);
      else sessionStorage.removeItem(KEY);
      done(true);
    };
    byId("key-cancel").onclick = () => done(false);
    dialog.oncancel = () => done(false);
    dialog.showModal();
    field.focus();
  });
  return asking;
}

async function ask(path, options, mayAsk) {
  const response = await fetch(path, { ...options, headers: headers(), credentials: "omit" });
  if (response.status === 401 && mayAsk && await askForKey()) return ask(path, options, true);
  if (response.ok) return response;
  let said = { message: `${response.status} ${response.statusText}` };
  try { said = (await response.json()).error ?? said; } catch { /* not ours: a proxy's page */ }
  throw new ApiError(said.message, response.status, said.param);
}

/** GET as text. `mayAsk`: whether a missing key is asked for. */
export async function getText(path, mayAsk = true) {
  return (await ask(path, {}, mayAsk)).text();
}

export async function getJson(path, mayAsk = true) {
  return fromJson(await getText(path, mayAsk));
}

export async function post(path, body, signal) {
  return fromJson(await (await ask(path, { method: "POST", body: toJson(body), signal }, true)).text());
}

/** POST, and yield the events of the answer's stream. */
export async function* stream(path, body, signal) {
  const response = await ask(path, { method: "POST", body: toJson(body), signal }, true);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find(each => each.startsWith("data: "));
      if (!line || line === "data: [DONE]") continue;
      const event = fromJson(line.slice(6));
      if (event.error) throw new ApiError(event.error.message, 200, event.error.param);
      yield event;
    }
  }
}

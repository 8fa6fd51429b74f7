// Ranges and defaults of parameters, from the server's own /openapi.json.

import { getJson } from "./api.js";

let document_ = null;

/** {minimum, maximum, exclusiveMinimum, type, enum}: what a request's field may be; {} where nothing is said. */
export async function fieldsOf(name) {
  document_ ??= getJson("openapi.json");
  const schemas = (await document_).components.schemas;
  const fields = {};
  for (const [field, said] of Object.entries(schemas[name].properties ?? {})) {
    const kinds = said.anyOf ?? [said];
    fields[field] = kinds.find(kind => kind.type !== "null" && !kind.$ref) ?? {};
  }
  return fields;
}

/** A range in words. */
export function shownRange({ minimum, maximum, exclusiveMinimum }) {
  const low = minimum ?? exclusiveMinimum;
  if (low === undefined) return "";
  return `${exclusiveMinimum === undefined ? "[" : "("}${short(low)}, ${short(maximum)}]`;
}

const short = value => Math.abs(value) >= 1e6 ? Number(value).toExponential(1).replace(".0", "") : String(value);

// The page's state is its address: "#playground/…" with the state as base64url, so that a link brings all of it back.

/** {view, state}: what the address says; state is null where it has none, or none that can be read. */
export function readHash() {
  const [view, packed] = location.hash.slice(1).split("/");
  return { view: view || "playground", state: packed ? unpack(packed) : null };
}

/** Put a view's state into the address; the history gets no entry for each letter that is typed. */
export function writeHash(view, state) {
  const packed = state === null ? "" : `/${pack(state)}`;
  history.replaceState(null, "", `#${view}${packed}`);
}

export function pack(state) {
  const bytes = new TextEncoder().encode(JSON.stringify(state));
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

export function unpack(packed) {
  try {
    const binary = atob(packed.replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(binary, character => character.charCodeAt(0));
    const state = JSON.parse(new TextDecoder().decode(bytes));
    return state && typeof state === "object" && !Array.isArray(state) ? state : null;
  } catch {
    return null;
  }
}

// The shell of the page: views by address, the model, the theme, the key.

import { askForKey, getJson } from "./lib/api.js";
import { byId, h } from "./lib/dom.js";
import { readHash } from "./lib/hash.js";

const VIEWS = ["playground", "dashboard", "rollouts"];
const THEMES = ["system", "light", "dark"];
const shown = {};

/** What views may ask of the shell. */
const shell = {
  models: [],
  get model() { return byId("model").value; },
  set model(name) {
    const select = byId("model");
    if (name && !this.models.some(model => model.id === name)) select.append(new Option(name, name));
    if (name) select.value = name;
  },
};

async function show() {
  const { view, state } = readHash();
  const name = VIEWS.includes(view) ? view : "playground";
  for (const each of VIEWS) byId(each).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${name} · myserve inspector`;
  shown[name] ??= import(`./${name}/view.js`).then(module => module.start(byId(name), shell));
  const started = await shown[name];
  for (const each of VIEWS) if (shown[each]) (await shown[each]).visible?.(each === name);
  started.restore?.(state);
}

function setTheme(theme) {
  const root = document.documentElement;
  if (theme === "system") root.removeAttribute("data-theme");
  else root.dataset.theme = theme;
  localStorage.setItem("myserve-theme", theme);
  const signs = { system: "◐", light: "☀", dark: "☾" };
  byId("theme").textContent = signs[theme];
  byId("theme").setAttribute("aria-label", `Theme: ${theme === "system" ? "as the system has it" : theme}`);
  byId("theme").onclick = () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
}

async function loadModels() {
  try {
    shell.models = (await getJson("v1/models")).data;
  } catch (error) {
    byId("view").prepend(h("p", { class: "notice bad", role: "alert" }, `The models could not be listed: ${error.message}`));
  }
  byId("model").replaceChildren(...shell.models.map(model => new Option(model.id, model.id)));
}

setTheme(localStorage.getItem("myserve-theme") ?? "system");
byId("key-button").onclick = async () => {
  if (await askForKey()) await loadModels();
};
document.querySelector(".skip").onclick = event => {
  event.preventDefault(); // the address is the state's
  byId("view").focus();
};
addEventListener("hashchange", show);
await loadModels();
await show();
document.body.dataset.ready = "true";

// The dashboard: what /metrics tells, every two seconds, as charts and as tables.

import { getJson, getText } from "../lib/api.js";
import { button, h } from "../lib/dom.js";
import { Chart, plain, seconds, share } from "../lib/chart.js";
import { parseMetrics, quantile, valueOf } from "../lib/prom.js";

const EVERY = 2; // seconds
const KEPT = 150; // readings: five minutes

const CHARTS = [
  ["Requests", {}, [
    ["running", (now, _, model) => valueOf(now, "vllm:num_requests_running", model)],
    ["waiting", (now, _, model) => valueOf(now, "vllm:num_requests_waiting", model)]]],
  ["Tokens drawn", { unit: "per second" }, [["tokens/s", rate("vllm:generation_tokens_total")]]],
  ["KV cache in use", { format: share }, [["in use", (now, _, model) => valueOf(now, "vllm:kv_cache_usage_perc", model)]]],
  ["Prefix cache hits", { unit: "of prompt tokens", format: share }, [["hits", ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")]]],
  ["Time to first token", { format: seconds, floor: 0.01 }, percentiles("vllm:time_to_first_token_seconds")],
  ["Inter-token latency", { format: seconds, floor: 0.01 }, percentiles("vllm:inter_token_latency_seconds")],
  ["Sampler's share", { unit: "of step time", format: share }, [["share", ratio("myserve:sampling_seconds_total", "myserve:step_seconds_total")]]],
  ["Weight version", {}, [["version", (now, _, model) => valueOf(now, "myserve:weight_version", model)]]],
];

function rate(name) {
  return (now, before, model, elapsed) => before && elapsed > 0 ? Math.max(0, valueOf(now, name, model) - valueOf(before, name, model)) / elapsed : null;
}

function ratio(part, whole) {
  return (now, before, model) => {
    const gained = name => valueOf(now, name, model) - (before ? valueOf(before, name, model) : 0);
    return gained(whole) > 0 ? gained(part) / gained(whole) : null;
  };
}

function percentiles(name) {
  return [["p50", 0.5], ["p90", 0.9], ["p99", 0.99]].map(([told, q]) => [told, (now, before, model) => quantile(now, before, name, model, q)]);
}

export async function start(root, shell) {
  const view = new Dashboard(root, shell);
  view.build();
  return view;
}

class Dashboard {
  constructor(root, shell) {
    Object.assign(this, { root, shell, readings: [], timer: null, paused: false });
  }

  build() {
    this.charts = CHARTS.map(([title, options, series]) => ({ chart: new Chart(title, options), series }));
    this.problem = h("p", { class: "notice bad", role: "alert", hidden: true });
    this.exactness = h("article", { class: "card exactness", "aria-label": "Exactness" });
    const pause = button("Pause", () => {
      this.paused = !this.paused;
      pause.textContent = this.paused ? "Go on" : "Pause";
      this.visible(true);
    });
    this.root.replaceChildren(
      h("div", { class: "row dash-head" }, h("div", {}, h("h2", {}, "Dashboard"), h("p", { class: "hint" }, `/metrics, every ${EVERY} s, of the chosen model; rates and percentiles are of the interval`)), pause),
      this.problem, h("div", { class: "charts" }, this.charts.map(({ chart }) => chart.node), this.exactness));
    document.getElementById("model").addEventListener("change", () => { this.readings = []; this.drawExactness(); });
    this.drawExactness();
  }

  visible(isVisible) {
    clearInterval(this.timer);
    if (!isVisible || this.paused) return;
    this.read();
    this.timer = setInterval(() => this.read(), EVERY * 1000);
  }

  async read() {
    try {
      const metrics = parseMetrics(await getText("metrics", false));
      this.problem.hidden = true;
      this.readings.push({ time: Date.now() / 1000, metrics });
      if (this.readings.length > KEPT + 1) this.readings.shift();
      this.draw();
    } catch (error) {
      this.problem.hidden = false;
      this.problem.textContent = `/metrics could not be read: ${error.message}`;
    }
  }

  draw() {
    const times = this.readings.map(({ time }) => time);
    for (const { chart, series } of this.charts) {
      chart.update(times, series.map(([name, number]) => ({ name, values: this.readings.map(({ time, metrics }, at) => {
        const before = this.readings[at - 1];
        return number(metrics, before?.metrics, this.shell.model, before ? time - before.time : 0);
      }) })));
    }
  }

  async drawExactness() {
    try {
      const version = await getJson("version", false);
      const facts = version.exact?.[this.shell.model] ?? {};
      const rows = [["version", version.version], ...Object.entries(facts)];
      const independent = facts.rows_are_independent;
      this.exactness.replaceChildren(h("h3", {}, "Exactness"),
        h("p", { class: "chart-value" }, independent === undefined ? "–" : independent ? "Rows are independent" : "Rows depend on their batch"),
        h("table", { class: "plain-table" }, h("tbody", {}, rows.map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, typeof value === "number" ? plain(value) : String(value)))))));
    } catch (error) {
      this.exactness.replaceChildren(h("h3", {}, "Exactness"), h("p", { class: "notice bad" }, error.message));
    }
  }
}

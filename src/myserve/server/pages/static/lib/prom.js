// Prometheus' text format, and what follows from two readings of it.

/** {name: [{labels, value}]} of a text. */
export function parseMetrics(text) {
  const metrics = {};
  for (const line of text.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const found = /^([\w:]+)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    (metrics[found[1]] ??= []).push({ labels, value: found[3] === "+Inf" ? Infinity : Number(found[3]) });
  }
  return metrics;
}

/** One model's number, 0 where it is not told; a counter's has `_total` behind its name. */
export function valueOf(metrics, name, model) {
  return (metrics[name] ?? []).find(({ labels }) => labels.model_name === undefined || labels.model_name === model)?.value ?? 0;
}

/** {bound: count} of one model's histogram, cumulative. */
function bucketsOf(metrics, name, model) {
  const found = (metrics[`${name}_bucket`] ?? []).filter(({ labels }) => labels.model_name === model);
  return found.map(({ labels, value }) => [labels.le === "+Inf" ? Infinity : Number(labels.le), value]);
}

/** A quantile of what a histogram gained between two readings, as histogram_quantile of Prometheus; null: it gained nothing. */
export function quantile(now, before, name, model, q) {
  const earlier = new Map(before ? bucketsOf(before, name, model) : []);
  const gained = bucketsOf(now, name, model).map(([bound, value]) => [bound, value - (earlier.get(bound) ?? 0)]);
  const total = gained.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  let low = 0, below = 0;
  for (const [bound, value] of gained) {
    if (value >= q * total) {
      if (bound === Infinity) return low;
      return value === below ? bound : low + (bound - low) * (q * total - below) / (value - below);
    }
    low = bound;
    below = value;
  }
  return low;
}

// Reads Prometheus' text format, as far as this server's /metrics use it.

export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^haomiao:([a-z0-9_]+)(?:\{(.*)\})? (\S+)$/i.exec(line);
    if (match) found.set(match[2] ? `${match[1]}{${match[2]}}` : match[1], Number(match[3]));
  }
  return found;
}

const outcome = (metrics, name) => metrics.get(`budget_requests_total{outcome="${name}"}`) ?? 0;

export function summary(metrics) {
  const predictions = metrics.get("predictions_total") ?? 0;
  const live = [...metrics].find(([name]) => /(step|live)_kl$/.test(name));
  return {
    met: ["met", "met_lower_point", "met_single_prefill", "truncated"].reduce((sum, name) => sum + outcome(metrics, name), 0),
    missed: outcome(metrics, "missed"),
    refused: outcome(metrics, "refused"),
    coverage: predictions ? metrics.get("predictions_covered_total") / predictions : null,
    p50: quantile(metrics, "e2e_request_latency_seconds", 0.5),
    p99: quantile(metrics, "e2e_request_latency_seconds", 0.99),
    running: metrics.get("num_requests_running") ?? 0,
    waiting: metrics.get("num_requests_waiting") ?? 0,
    kv: metrics.get("kv_cache_usage_perc") ?? null,
    live: live ? live[1] : null,
    restarts: metrics.get("engine_restarts") ?? 0,
  };
}

// Milliseconds, interpolated inside the bucket as Prometheus does it; null without observations.
function quantile(metrics, name, share) {
  const buckets = [...metrics].filter(([key]) => key.startsWith(`${name}_bucket{`))
    .map(([key, count]) => [Number(/le="([^"]+)"/.exec(key)[1].replace("+Inf", "Infinity")), count]).sort((a, b) => a[0] - b[0]);
  const all = buckets.at(-1)?.[1] ?? 0;
  if (!all) return null;
  let [low, before] = [0, 0];
  for (const [high, count] of buckets) {
    if (count >= share * all) return 1e3 * (high === Infinity ? low : low + ((high - low) * (share * all - before)) / (count - before));
    [low, before] = [high, count];
  }
  return null;
}

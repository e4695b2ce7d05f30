// The playground: what is typed is read ahead, what is asked is answered inside the budget, and the receipt is shown.

import { parse, summary } from "/page/metrics.js";
import * as plots from "/page/plots.js";
import { Realtime } from "/page/realtime.js";
import { firstLanguage, ms, say, translate } from "/page/words.js";

const $ = (id) => document.getElementById(id);
const realtime = new Realtime();
const state = { ready: false, form: "chat", sent: [], items: [], active: null, answers: [], chosen: -1, status: { kind: "connecting" }, ahead: null };

// ---- budget ---------------------------------------------------------------------------------------------------------

const NONE = 100;

function budget() {
  const value = Number($("budget").value);
  if (value >= NONE) return null;
  const raw = 5 * 2000 ** (value / (NONE - 1)); // 5 ms to 10 s, evenly by ratio
  const unit = 10 ** Math.max(0, Math.floor(Math.log10(raw)) - 1);
  return Math.round(raw / unit) * unit;
}

function showBudget() {
  const text = budget() === null ? say("none") : ms(budget()).replace(/\.0+ /, " ");
  $("budget-text").textContent = text;
  $("budget").setAttribute("aria-valuetext", text);
}

// ---- reading ahead --------------------------------------------------------------------------------------------------

function hear() {
  if (!state.ready) return;
  const now = Array.from($("prompt").value); // code points, as the server counts
  let start = 0;
  while (start < now.length && start < state.sent.length && now[start] === state.sent[start]) start += 1;
  if (start === now.length && start === state.sent.length) return;
  if (realtime.send("input_text_buffer.replace", { start, text: now.slice(start).join("") })) state.sent = now;
  state.ahead = now.length ? "reading" : null;
  showAhead();
}

function showAhead() {
  const ahead = state.ahead;
  $("ahead").textContent = ahead === null ? say("empty") : ahead === "reading" ? say("readingAhead")
    : say(ahead.ms ? "ahead" : "aheadCached", { tokens: ahead.tokens, ms: ahead.ms.toFixed(1) });
  $("ahead-meter").value = ahead === null ? 0 : ahead === "reading" ? 0.5 : 1;
}

// ---- asking ---------------------------------------------------------------------------------------------------------

function ask() {
  if (!state.ready || state.active || !$("prompt").value.trim()) return;
  hear();
  const response = { conversation: "none", max_output_tokens: Math.max(1, Number($("max-tokens").value) || 64) };
  response.temperature = Math.max(0, Number($("temperature").value) || 0);
  response.on_budget = $("on-budget").value;
  if (budget() !== null) response.budget_ms = budget();
  if ($("min-point").value) response.min_point = $("min-point").value;
  complain("");
  realtime.send("input_text_buffer.commit");
  realtime.send("response.create", { response });
  state.sent = [];
  state.active = { began: performance.now(), budget: response.budget_ms ?? null, ticks: [], tokens: 0, prompt: $("prompt").value };
  $("answer").replaceChildren();
  if (state.form === "text") { // a continuation is read with what it continues
    const asked = document.createElement("span");
    asked.className = "asked";
    asked.textContent = state.active.prompt;
    $("answer").append(asked);
  }
  $("answer").setAttribute("aria-busy", "true");
  $("outcome").hidden = true;
  buttons();
}

function buttons() {
  $("send").disabled = !state.ready || state.active !== null || !$("prompt").value.trim();
  $("stop").hidden = state.active === null;
}

function rest() {
  state.active = null;
  $("answer").setAttribute("aria-busy", "false");
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function showStatus() {
  const { kind, detail = "" } = state.status;
  $("status").dataset.state = { ready: "ready", lost: "bad" }[kind] ?? "wait";
  $("status-text").textContent = detail ? `${say(kind)} · ${detail}` : say(kind);
}

// ---- answers --------------------------------------------------------------------------------------------------------

realtime.addEventListener("response.output_text.delta", ({ detail }) => {
  const active = state.active;
  if (!active) return;
  active.ticks.push(performance.now() - active.began);
  active.tokens += detail.haomiao.tokens;
  const token = document.createElement("span");
  token.className = "token";
  token.dataset.point = detail.haomiao.point;
  token.title = detail.haomiao.point;
  token.textContent = detail.delta;
  $("answer").append(token);
});

realtime.addEventListener("response.done", ({ detail }) => {
  const { response } = detail;
  const active = state.active;
  rest();
  // every question stands for itself: the prompt stays in the box, and is read again (it is still in the cache)
  for (const id of state.items.splice(0)) realtime.send("conversation.item.delete", { item_id: id });
  hear();
  if (active) finish(response, active);
  buttons();
});

function finish(response, active) {
  const receipt = response.haomiao?.receipt ?? null;
  const error = response.status_details?.error;
  const outcome = receipt?.outcome ?? (response.status === "failed" && /budget|overload/.test(error?.type ?? "") ? "refused" : response.status);
  if (error) complain(error.predicted_ms ? `${error.message} (${say("predicted")} ${ms(error.predicted_ms)})` : error.message);
  state.answers.push({ receipt, outcome, ticks: active.ticks, detail: response.haomiao?.finish_detail ?? null,
    budget: active.budget, total: receipt?.total_ms ?? performance.now() - active.began });
  show(state.answers.length - 1);
  poll();
}

const LATE = new Set(["missed", "refused", "truncated", "cancelled", "failed"]);

function show(index) {
  state.chosen = index;
  const answer = state.answers[index];
  if (answer) {
    $("outcome").hidden = false;
    $("outcome").textContent = say(`outcome.${answer.outcome}`);
    $("outcome").classList.toggle("bad", LATE.has(answer.outcome));
    showReceipt(answer);
    showTimeline(answer);
  }
  $("copy").disabled = !answer?.receipt;
  const answers = state.answers.map(({ total, budget, outcome }) => ({ total, budget, late: LATE.has(outcome) }));
  const last = state.answers.at(-1);
  const label = last ? say("latencyLabel", { count: answers.length, total: last.total.toFixed(1), budget: last.budget ? ms(last.budget) : say("none") }) : say("noPlot");
  plots.latency($("latency"), answers, index, show, (value) => ms(value).replace(/\.0+ /, " "), label);
  const measured = state.answers.map(({ receipt }) => receipt?.estimated_error ?? null);
  const live = state.answers.map(({ receipt }) => receipt?.step_kl ?? receipt?.replay_kl ?? null);
  const kl = measured.at(-1);
  plots.error($("error"), { measured, live }, (value) => value.toPrecision(2).replace(/\.?0+(e|$)/, "$1"),
    kl === null || kl === undefined ? say("noPlot") : say("errorLabel", { kl: kl.toPrecision(3) }));
}

const ROWS = ["outcome", "budget_ms", "predicted_ms", "total_ms", "ttft_ms", "prompt_tokens", "cached_tokens", "completion_tokens",
  "schedule", "estimated_error", "step_kl", "replay_kl", "drafted_tokens", "accepted_tokens", "finish", "seed", "model"];

function showReceipt({ receipt, outcome, detail }) {
  const rows = [];
  for (const name of receipt ? ROWS : ["outcome"]) {
    let value = receipt?.[name];
    if (name === "outcome") value = say(`outcome.${receipt ? receipt.outcome ?? "none" : outcome}`);
    else if (name === "finish") value = detail;
    else if (name === "schedule") value = value?.map((entry) => `${entry.point} × ${entry.tokens}`).join(" → ");
    else if (value !== null && value !== undefined && name.endsWith("_ms")) value = ms(value);
    else if (typeof value === "number" && /error|kl/.test(name)) value = value.toPrecision(3);
    if (value === null || value === undefined || value === "" || (value === 0 && /drafted|accepted/.test(name))) continue;
    const [term, said] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = say(`r.${name}`);
    said.textContent = value;
    said.dataset.name = name;
    rows.push(term, said);
  }
  $("receipt").replaceChildren(...rows);
}

function showTimeline({ receipt, ticks, budget: limit }) {
  for (const name of ["queue", "prefill", "decode"]) $(`t-${name}`).textContent = receipt ? ms(receipt[`${name}_ms`]) : "–";
  if (!receipt) return void $("timeline").replaceChildren();
  const parts = ["queue", "prefill", "decode"].map((name) => [name, receipt[`${name}_ms`]]);
  const marks = [];
  if (limit !== null) marks.push({ at: limit, text: `${say("budget")} ${ms(limit).replace(/\.0+ /, " ")}`, kind: "limit" });
  if (receipt.predicted_ms !== null) marks.push({ at: receipt.predicted_ms, text: `${say("predicted")} ${ms(receipt.predicted_ms)}`, kind: "bound" });
  const label = say("timelineLabel", { queue: receipt.queue_ms.toFixed(1), prefill: receipt.prefill_ms.toFixed(1), decode: receipt.decode_ms.toFixed(1),
    total: receipt.total_ms.toFixed(1), budget: limit === null ? say("none") : ms(limit) });
  plots.timeline($("timeline"), parts, marks, ticks, label);
}

function showPoints(session) {
  const { points, errors } = session.haomiao;
  const kept = $("min-point").value;
  $("min-point").replaceChildren(new Option(say("any"), ""), ...points.map((point) => new Option(point, point)));
  $("min-point").options[0].dataset.say = "any";
  $("min-point").value = points.includes(kept) ? kept : "";
  $("legend").hidden = false;
  $("legend").replaceChildren(...points.map((point) => {
    const [entry, sample] = [document.createElement("li"), document.createElement("span")];
    sample.className = "token";
    sample.dataset.point = point;
    sample.textContent = point;
    entry.append(sample, errors[point] === undefined ? "" : `  KL ${errors[point].toPrecision(2)}`);
    return entry;
  }));
}

// ---- connection -----------------------------------------------------------------------------------------------------

realtime.addEventListener("session.created", ({ detail }) => {
  Object.assign(state, { ready: true, form: detail.session.prompt_format, sent: [], items: [], active: null, status: { kind: "ready", detail: detail.session.model } });
  $("key-form").hidden = true;
  if (realtime.key) sessionStorage.setItem("haomiao-key", realtime.key);
  showPoints(detail.session);
  showStatus();
  if ($("instructions").value) instruct();
  hear();
  buttons();
  poll();
});

realtime.addEventListener("waiting", ({ detail }) => {
  state.ready = false;
  const { what, done, total } = detail.loading ?? {};
  const progress = what ? `${what}${total ? ` ${Math.round((100 * done) / total)} %` : ""}` : "";
  state.status = detail.lost ? { kind: "lost" } : { kind: "loading", detail: progress };
  rest();
  showStatus();
  buttons();
});

realtime.addEventListener("key", () => {
  if (realtime.key) complain(say("keyWrong"));
  sessionStorage.removeItem("haomiao-key");
  $("key-form").hidden = false;
  $("key").focus();
});

realtime.addEventListener("conversation.item.added", ({ detail }) => {
  if (detail.item.role === "user") state.items.push(detail.item.id);
});

realtime.addEventListener("input_text_buffer.computed", ({ detail }) => {
  if (state.active || !state.sent.length) return;
  state.ahead = detail.haomiao;
  showAhead();
});

realtime.addEventListener("error", ({ detail }) => {
  complain(detail.error.message);
  if (detail.error.code === "context_length_exceeded") state.sent = [];
  if (state.active && !state.active.tokens) rest();
  buttons();
});

const instruct = () => realtime.send("session.update", { session: { instructions: $("instructions").value } });

// ---- the server's own figures ---------------------------------------------------------------------------------------

let polled = 0;

async function poll() {
  if (document.hidden || !state.ready || performance.now() - polled < 300) return;
  polled = performance.now();
  try {
    const reply = await fetch("/metrics", { headers: realtime.headers() });
    if (reply.ok) showServer(summary(parse(await reply.text())));
  } catch { /* the connection says that it is lost */ }
}

function showServer(figures) {
  const percent = (value) => `${(100 * value).toFixed(value > 0.99 && value < 1 ? 2 : 0)} %`;
  const tiles = Object.entries(figures).filter(([, value]) => value !== null).map(([name, value]) => {
    const [tile, term, said] = ["div", "dt", "dd"].map((kind) => document.createElement(kind));
    term.textContent = say(`s.${name}`);
    said.textContent = /^p\d/.test(name) ? ms(value) : /coverage|kv/.test(name) ? percent(value) : name === "live" ? value.toPrecision(3) : value;
    said.dataset.name = name;
    tile.append(term, said);
    return tile;
  });
  $("server").replaceChildren(...tiles);
}

// ---- the page -------------------------------------------------------------------------------------------------------

function speak(language) {
  translate(language);
  showBudget();
  showAhead();
  showStatus();
  show(state.chosen);
  poll();
}

$("prompt").addEventListener("input", () => { hear(); buttons(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { // an input method's Enter chooses a word
    event.preventDefault();
    ask();
  }
});
$("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("stop").addEventListener("click", () => realtime.send("response.cancel"));
$("budget").addEventListener("input", showBudget);
$("instructions").addEventListener("change", instruct);
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(JSON.stringify(state.answers[state.chosen].receipt, null, 2));
  $("copy").textContent = say("copied");
  setTimeout(() => { $("copy").textContent = say("copy"); }, 1500);
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  realtime.key = $("key").value.trim();
  complain("");
  realtime.connect();
});
for (const language of ["en", "zh"]) $(`lang-${language}`).addEventListener("click", () => speak(language));
window.addEventListener("resize", () => {
  clearTimeout(state.resizing);
  state.resizing = setTimeout(() => show(state.chosen), 100);
});
document.addEventListener("visibilitychange", poll);
setInterval(poll, 2000);

realtime.key = sessionStorage.getItem("haomiao-key") ?? "";
speak(firstLanguage());
realtime.connect();

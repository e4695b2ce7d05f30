// What the page says, in two languages. `say` gives a text, `translate` puts texts into the document.

const WORDS = {
  en: {
    skip: "Skip to the prompt", key: "API key", connect: "Connect",
    keyHint: "This server asks for a key. It is kept in this tab only.", keyWrong: "This key was not accepted.",
    ask: "Ask", prompt: "Prompt", promptHint: "Type, and it is read while you type …", budget: "Budget", none: "none",
    more: "More", tokens: "Most tokens", temperature: "Temperature", onBudget: "If the budget is short",
    degrade: "lower the point, then the length", truncate: "fewer tokens, same point", refuse: "refuse",
    minPoint: "Least accurate point", any: "any", instructions: "Instructions",
    keys: "Enter to ask, Shift+Enter for a new line", stop: "Stop", send: "Ask", answer: "Answer",
    nothing: "Nothing yet. The prompt is read while you type, so that the answer begins at once.",
    timeline: "Where the time went", queue: "queue", prefill: "reading", decode: "writing", receipt: "Receipt",
    copy: "Copy JSON", copied: "Copied", latency: "Latency of your answers",
    latencyHint: "A dot is an answer, the bar above it its budget; hollow is not in time.",
    error: "Error against the full model",
    errorHint: "Mean KL divergence, nats a token: as measured for the points that ran, and live where the monitor looked.",
    server: "This server", connecting: "connecting", loading: "loading the model", ready: "ready", lost: "not connected, trying again",
    ahead: "{tokens} tokens read ahead, {ms} ms for the last of them", aheadCached: "{tokens} tokens read ahead", readingAhead: "reading …", empty: "\u00a0",
    points: "Operating points", predicted: "predicted", first: "first token",
    outcome: { met: "in time", met_lower_point: "in time, at a lower point", met_single_prefill: "in time, chosen in one prefill",
      truncated: "cut to fit", missed: "late",
      refused: "refused", cancelled: "stopped", failed: "failed", none: "no budget", completed: "done", incomplete: "length reached" },
    r: { outcome: "outcome", budget_ms: "budget", predicted_ms: "predicted bound", total_ms: "actual", ttft_ms: "first token",
      queue_ms: "queue", prefill_ms: "reading", decode_ms: "writing", prompt_tokens: "prompt tokens", cached_tokens: "read ahead or cached",
      completion_tokens: "answer tokens", schedule: "points", estimated_error: "error, measured", step_kl: "error, live",
      replay_kl: "error, replayed", finish: "ended by", seed: "seed", model: "model", drafted_tokens: "drafted tokens",
      accepted_tokens: "of them accepted" },
    s: { met: "budgets met", missed: "missed", refused: "refused", coverage: "bounds held", p50: "median answer", p99: "p99 answer",
      running: "running", waiting: "waiting", kv: "KV in use", kl: "error of the last", live: "live error", restarts: "engine restarts" },
    timelineLabel: "Queue {queue} ms, reading {prefill} ms, writing {decode} ms, in all {total} ms of {budget}",
    latencyLabel: "{count} answers; the last took {total} ms of {budget}", errorLabel: "Error of the last answer: {kl} nats a token",
    noPlot: "No answer yet",
  },
  zh: {
    skip: "跳到提示", key: "API 密钥", connect: "连接",
    keyHint: "此服务器需要密钥。密钥只保存在本标签页中。", keyWrong: "此密钥未被接受。",
    ask: "提问", prompt: "提示", promptHint: "开始输入，边输入边读取……", budget: "预算", none: "不限",
    more: "更多", tokens: "最多词元", temperature: "温度", onBudget: "预算不足时",
    degrade: "先降工作点，再减长度", truncate: "减少词元，工作点不变", refuse: "拒绝",
    minPoint: "最低精度的工作点", any: "不限", instructions: "指示",
    keys: "回车提问，Shift+回车换行", stop: "停止", send: "提问", answer: "回答",
    nothing: "还没有回答。提示在您输入时就已读取，因此回答会立即开始。",
    timeline: "时间用在哪里", queue: "排队", prefill: "读取", decode: "书写", receipt: "回执",
    copy: "复制 JSON", copied: "已复制", latency: "各次回答的延迟",
    latencyHint: "一点为一次回答，其上的横线为预算；空心表示未按时。",
    error: "相对完整模型的误差",
    errorHint: "平均 KL 散度，奈特每词元：所用工作点的实测值，以及监视器抽查到的实时值。",
    server: "本服务器", connecting: "正在连接", loading: "正在加载模型", ready: "就绪", lost: "未连接，正在重试",
    ahead: "已预读 {tokens} 个词元，最后一段用时 {ms} 毫秒", aheadCached: "已预读 {tokens} 个词元", readingAhead: "正在读取……", empty: "\u00a0",
    points: "工作点", predicted: "预测", first: "首词元",
    outcome: { met: "按时", met_lower_point: "按时（较低工作点）", met_single_prefill: "按时（一次预填充选出）", truncated: "已截短", missed: "迟到",
      refused: "被拒绝", cancelled: "已停止", failed: "失败", none: "无预算", completed: "完成", incomplete: "到达长度" },
    r: { outcome: "结果", budget_ms: "预算", predicted_ms: "预测上界", total_ms: "实际", ttft_ms: "首词元",
      queue_ms: "排队", prefill_ms: "读取", decode_ms: "书写", prompt_tokens: "提示词元", cached_tokens: "预读或缓存",
      completion_tokens: "回答词元", schedule: "工作点", estimated_error: "误差（实测）", step_kl: "误差（实时）",
      replay_kl: "误差（重放）", finish: "结束原因", seed: "种子", model: "模型", drafted_tokens: "草拟词元",
      accepted_tokens: "其中接受" },
    s: { met: "按时", missed: "迟到", refused: "拒绝", coverage: "上界成立", p50: "回答中位数", p99: "回答 p99",
      running: "运行中", waiting: "等待中", kv: "KV 占用", kl: "最近误差", live: "实时误差", restarts: "引擎重启" },
    timelineLabel: "排队 {queue} 毫秒，读取 {prefill} 毫秒，书写 {decode} 毫秒，共 {total} 毫秒，预算 {budget}",
    latencyLabel: "{count} 次回答；最近一次用时 {total} 毫秒，预算 {budget}", errorLabel: "最近回答的误差：{kl} 奈特每词元",
    noPlot: "还没有回答",
  },
};

let language = "en";

export function say(path, values = {}) {
  let text = path.split(".").reduce((found, key) => found?.[key], WORDS[language]) ?? path.split(".").at(-1);
  for (const [name, value] of Object.entries(values)) text = text.replaceAll(`{${name}}`, value);
  return text;
}

export function ms(value) {
  if (value === null || value === undefined) return "–";
  const digits = value < 10 ? 2 : value < 100 ? 1 : 0;
  const unit = language === "zh" ? "毫秒" : "ms";
  return value >= 10000 ? `${Number((value / 1000).toFixed(1))} ${language === "zh" ? "秒" : "s"}` : `${value.toFixed(digits)} ${unit}`;
}

export function firstLanguage() {
  const kept = localStorage.getItem("haomiao-language");
  return kept === "en" || kept === "zh" ? kept : navigator.language.startsWith("zh") ? "zh" : "en";
}

export function translate(to) {
  language = to;
  localStorage.setItem("haomiao-language", to);
  document.documentElement.lang = to === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  for (const element of document.querySelectorAll("[data-placeholder]")) element.placeholder = say(element.dataset.placeholder);
  for (const name of ["en", "zh"]) document.getElementById(`lang-${name}`).setAttribute("aria-pressed", String(name === to));
}

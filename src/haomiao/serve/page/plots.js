// Small drawings in SVG: a timeline and two plots. Each takes numbers and an element, and knows nothing else.

const NS = "http://www.w3.org/2000/svg";

function draw(parent, name, attributes = {}, text = null) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

// One unit is one pixel, so that letters have the same size in every drawing.
function canvas(element, height) {
  element.replaceChildren();
  const width = element.clientWidth || 400;
  return [draw(element, "svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }), width];
}

// parts: [[class, ms], ...]; marks: [{at, text, kind}]; ticks: ms since the request at which tokens came
export function timeline(element, parts, marks, ticks, label) {
  const [svg, width] = canvas(element, 58);
  const spent = parts.reduce((sum, [, value]) => sum + value, 0);
  const end = Math.max(spent, ...marks.map((mark) => mark.at)) * 1.02 || 1;
  const x = (value) => (Math.min(value, end) / end) * width;
  draw(svg, "line", { class: "axis", x1: 0, x2: width, y1: 40, y2: 40 });
  let at = 0;
  for (const [kind, value] of parts) {
    draw(svg, "rect", { class: kind, x: x(at), y: 18, width: Math.max(value > 0 ? 1 : 0, x(at + value) - x(at)), height: 22, rx: 2 });
    at += value;
  }
  for (const tick of ticks) if (tick <= spent) draw(svg, "line", { class: "tick", x1: x(tick), x2: x(tick), y1: 20, y2: 38 });
  for (const [index, mark] of marks.entries()) {
    const place = x(mark.at);
    draw(svg, "line", { class: `mark ${mark.kind}`, x1: place, x2: place, y1: 13, y2: 44 });
    const anchor = place > width * 0.7 ? "end" : place < width * 0.15 ? "start" : "middle";
    draw(svg, "text", { x: place, y: index % 2 ? 56 : 9, "text-anchor": anchor }, mark.text);
  }
  element.setAttribute("aria-label", label);
}

const nice = (value) => {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value);
};

function frame(svg, width, height, top, format) {
  for (const share of [0, 0.5, 1]) {
    const y = height - 6 - share * (height - 20);
    draw(svg, "line", { class: "axis", x1: 44, x2: width, y1: y, y2: y });
    draw(svg, "text", { x: 38, y: y + 4, "text-anchor": "end" }, format(top * share));
  }
}

// answers: [{total, budget, late}]; choose is called with the index of a dot that is clicked
export function latency(element, answers, chosen, choose, format, label) {
  const height = 150;
  const [svg, width] = canvas(element, height);
  element.setAttribute("aria-label", label);
  if (!answers.length) return void draw(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, label);
  const shown = answers.slice(-40);
  const first = answers.length - shown.length;
  const top = nice(Math.max(...shown.map((answer) => Math.max(answer.total, Math.min(answer.budget ?? 0, answer.total * 3))), 1e-3));
  const y = (value) => height - 6 - (Math.min(value, top) / top) * (height - 20);
  const step = (width - 60) / Math.max(shown.length, 8);
  frame(svg, width, height, top, format);
  shown.forEach((answer, index) => {
    const x = 56 + index * step;
    if (answer.budget && answer.budget <= top) draw(svg, "line", { class: "mark", x1: x - 5, x2: x + 5, y1: y(answer.budget), y2: y(answer.budget) });
    const state = `${answer.late ? " late" : ""}${first + index === chosen ? " chosen" : ""}`;
    draw(svg, "circle", { class: `dot${state}`, cx: x, cy: y(answer.total), r: 4 });
    draw(svg, "rect", { class: "hit", x: x - step / 2, y: 0, width: step, height }).addEventListener("click", () => choose(first + index));
  });
}

// series: {measured: [numbers or null], live: [numbers or null]}
export function error(element, series, format, label) {
  const height = 120;
  const [svg, width] = canvas(element, height);
  element.setAttribute("aria-label", label);
  const measured = series.measured.slice(-40);
  const live = series.live.slice(-40);
  const known = [...measured, ...live].filter((value) => value !== null && value !== undefined);
  if (!known.length) return void draw(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, label);
  const top = nice(Math.max(...known, 1e-6));
  const step = (width - 60) / Math.max(measured.length, 8);
  frame(svg, width, height, top, format);
  for (const [values, kind] of [[measured, "line"], [live, "line live"]]) {
    const points = values.map((value, index) => [56 + index * step, value]).filter(([, value]) => value !== null && value !== undefined)
      .map(([x, value]) => [x, height - 6 - (value / top) * (height - 20)]);
    if (points.length > 1) draw(svg, "polyline", { class: kind, points: points.map((point) => point.join(",")).join(" ") });
    for (const [cx, cy] of points) draw(svg, "circle", { class: "dot", cx, cy, r: 2.5 });
  }
}

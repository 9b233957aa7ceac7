"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// ---- samples over training -------------------------------------------------------------------------------------
(function () {
  const slider = document.getElementById("sample-slider");
  if (!slider) return;
  const image = document.getElementById("sample-image");
  const label = document.getElementById("sample-label");
  const play = document.getElementById("sample-play");
  let timer = null;
  function show(n) {
    const shot = data.samples[n];
    slider.value = n;
    slider.setAttribute("aria-valuetext", shot.label);
    image.src = shot.src;
    image.alt = "Samples at " + shot.label;
    label.textContent = shot.label;
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  }
  slider.addEventListener("input", () => { stop(); show(+slider.value); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    if (+slider.value === data.samples.length - 1) show(0);
    timer = setInterval(() => {
      if (+slider.value >= data.samples.length - 1) return stop();
      show(+slider.value + 1);
    }, 450);
  });
  show(data.samples.length - 1);
})();

// ---- curves ----------------------------------------------------------------------------------------------------
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 52, right: 10, top: 8, bottom: 22 };
const COLORS = 8;

function element(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

function format(value) {
  const size = Math.abs(value);
  let shown = String(+value.toPrecision(3));
  if (size !== 0 && (size < 0.001 || size >= 1e6)) shown = value.toExponential(1);
  else if (size >= 1000) shown = Math.round(value).toLocaleString("en");
  return shown.replace("-", "\u2212");
}

function shortStep(step) {
  if (step >= 1e6) return +(step / 1e6).toPrecision(3) + "M";
  if (step >= 1e4) return +(step / 1e3).toPrecision(3) + "k";
  return step.toLocaleString("en");
}

function roundTicks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = Math.pow(10, Math.floor(Math.log10(raw)));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw) * power;
  const ticks = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) ticks.push(+t.toPrecision(10));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  const decades = Math.log10(high / low);
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const m of decades > 2.5 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 5]) {
      const t = m * Math.pow(10, e);
      if (t >= low * 0.999 && t <= high * 1.001) ticks.push(t);
    }
  }
  const every = Math.ceil(ticks.length / 6);
  return ticks.filter((_, n) => n % every === 0);
}

function smooth(values) {
  // A Gaussian window centered on each point, so that the curve does not lag behind.
  const width = Math.max(1, values.length / 60), reach = Math.ceil(2.5 * width);
  return values.map((_, i) => {
    let sum = 0, weight = 0;
    for (let j = Math.max(0, i - reach); j <= Math.min(values.length - 1, i + reach); j++) {
      const w = Math.exp(-0.5 * ((i - j) / width) ** 2);
      sum += w * values[j];
      weight += w;
    }
    return sum / weight;
  });
}

function range(series, log) {
  // The first steps of a run can be wild: the axis follows the bulk of the points.
  const all = series.flatMap((s) => s.values).filter((v) => !log || v > 0).sort((a, b) => a - b);
  const at = (q) => all[Math.min(all.length - 1, Math.max(0, Math.round(q * (all.length - 1))))];
  let low = at(0.005), high = at(0.99);
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
  if (low > 0 && low < 0.35 * high) low = 0;
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low === 0 ? 0 : low - pad, high + pad];
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return step - steps[low] < steps[high] - step ? low : high;
}

function chart(host, spec, number) {
  const positive = spec.series.every((s) => s.values.every((v) => v > 0));
  let log = spec.log && positive;
  let cursor = null;
  const first = Math.min(...spec.series.map((s) => s.steps[0]));
  const last = Math.max(...spec.series.map((s) => s.steps[s.steps.length - 1]));
  const smoothed = spec.series.map((s) => (s.values.length > 60 ? smooth(s.values) : null));

  const head = document.createElement("header");
  const title = document.createElement("h3");
  title.textContent = spec.title;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "log";
  button.title = "Logarithmic axis";
  button.disabled = !positive;
  head.append(title, button);
  const legend = document.createElement("ul");
  const readouts = spec.series.map((s, n) => {
    const item = document.createElement("li");
    const mark = document.createElement("i");
    mark.style.background = "var(--s" + (n % COLORS) + ")";
    if (n >= COLORS) mark.style.opacity = 0.55;  // dashed
    const value = document.createElement("b");
    item.append(mark, s.name.replaceAll("_", " ") + " ", value);
    legend.append(item);
    return value;
  });
  const when = document.createElement("li");
  legend.append(when);
  const label = spec.title + " over steps; arrow keys read values";
  const svg = element("svg", { tabindex: 0, role: "img", "aria-label": label });
  host.append(head, legend, svg);

  let toX, fromX, toY, line;
  function read() {
    spec.series.forEach((s, n) => {
      const values = smoothed[n] || s.values;
      const index = cursor === null ? values.length - 1 : nearest(s.steps, cursor);
      readouts[n].textContent = format(cursor === null ? values[index] : s.values[index]);
    });
    when.textContent = cursor === null ? "" : "step " + Math.round(cursor).toLocaleString("en");
    if (!line) return;
    line.setAttribute("visibility", cursor === null ? "hidden" : "visible");
    if (cursor !== null) { line.setAttribute("x1", toX(cursor)); line.setAttribute("x2", toX(cursor)); }
  }
  function draw() {
    const width = svg.clientWidth, height = svg.clientHeight;
    if (!width) return;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    button.setAttribute("aria-pressed", String(log));
    const [low, high] = range(spec.series, log);
    const f = log ? Math.log : (v) => v;
    const inner = width - MARGIN.left - MARGIN.right, tall = height - MARGIN.top - MARGIN.bottom;
    toX = (s) => MARGIN.left + (inner * (s - first)) / (last - first || 1);
    fromX = (x) => first + ((x - MARGIN.left) / inner) * (last - first);
    toY = (v) => MARGIN.top + tall * (1 - (f(v) - f(low)) / (f(high) - f(low)));
    for (const t of log ? logTicks(low, high) : roundTicks(low, high, 4)) {
      const y = toY(t);
      if (y < MARGIN.top - 1 || y > MARGIN.top + tall + 1) continue;
      element("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }, svg);
      element("text", { x: MARGIN.left - 7, y: y + 4, "text-anchor": "end" }, svg, format(t));
    }
    for (const t of roundTicks(first, last, Math.max(2, Math.floor(inner / 72)))) {
      const x = toX(t);
      const anchor = x > width - MARGIN.right - 14 ? "end" : x < MARGIN.left + 8 ? "start" : "middle";
      element("text", { x, y: height - 5, "text-anchor": anchor }, svg, shortStep(t));
    }
    const clip = element("clipPath", { id: "clip" + number }, svg);
    element("rect", { x: MARGIN.left, y: MARGIN.top - 2, width: inner + 2, height: tall + 4 }, clip);
    const area = element("g", { "clip-path": `url(#clip${number})` }, svg);
    for (const [kind, steps] of [["resume", data.resumes], ["warning", data.warnings]]) {
      for (const step of steps) {
        if (step < first || step > last) continue;
        const x = toX(step);
        element("line", { class: kind, x1: x, x2: x, y1: MARGIN.top, y2: MARGIN.top + tall }, area);
      }
    }
    spec.series.forEach((s, n) => {
      const place = (v, i) => (i ? "L" : "M") + toX(s.steps[i]).toFixed(1) + " " + toY(v).toFixed(1);
      const path = (values) => values.map(place).join("");
      const stroke = `stroke: var(--s${n % COLORS})` + (n < COLORS ? "" : "; stroke-dasharray: 5 3");
      if (smoothed[n]) element("path", { class: "raw", d: path(s.values), style: stroke }, area);
      element("path", { d: path(smoothed[n] || s.values), style: stroke }, area);
    });
    line = element("line", { class: "cursor", y1: MARGIN.top, y2: MARGIN.top + tall, visibility: "hidden" }, svg);
    read();
  }
  function point(event) {
    const x = event.clientX - svg.getBoundingClientRect().left;
    const steps = spec.series[0].steps;
    cursor = steps[nearest(steps, Math.min(last, Math.max(first, fromX(x))))];
    read();
  }
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", () => { cursor = null; read(); });
  svg.addEventListener("blur", () => { cursor = null; read(); });
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const steps = spec.series[0].steps;
    const now = cursor === null ? steps.length - 1 : nearest(steps, cursor) + by * (event.shiftKey ? 10 : 1);
    cursor = steps[Math.min(steps.length - 1, Math.max(0, now))];
    read();
  });
  button.addEventListener("click", () => { log = !log; draw(); });
  new ResizeObserver(draw).observe(svg);
  draw();
}

document.querySelectorAll("[data-chart]").forEach((host) => {
  chart(host, data.charts[+host.dataset.chart], host.dataset.chart);
});

// Draws the seconds of each stage as bars on one scale.

import { STAGES, seconds } from "./words.js";

/** Fills `target` with one row per lane: `{name, report, expectedS}`. */
export function drawWaterfall(target, lanes) {
  const totals = lanes.map(({ report }) => stagesOf(report).reduce((sum, [, s]) => sum + s, 0));
  const expected = lanes.map((lane) => lane.expectedS ?? 0);
  const scaleS = Math.max(1e-6, ...totals, ...expected, ...lanes.map((lane) => lane.report.ttft_s));
  target.replaceChildren(...lanes.map((lane) => row(lane, scaleS)), legend());
}

const stagesOf = (report) =>
  Object.keys(STAGES).map((field) => [field, Math.max(0, report[field] ?? 0)]);

function row({ name, report, expectedS }, scaleS) {
  const box = element("div", "wf-row");
  box.append(element("h3", "wf-name", name));
  const bars = element("div", "wf-bars");
  for (const [field, lasted] of stagesOf(report)) {
    if (lasted > 0) bars.append(bar(field, lasted, scaleS));
  }
  const mark = element("span", "wf-first");
  mark.style.setProperty("--at", report.ttft_s / scaleS);
  mark.title = `first token after ${seconds(report.ttft_s)}`;
  bars.append(mark);
  box.append(bars);
  if (expectedS !== undefined) {
    const line = element("div", "wf-expected");
    line.style.setProperty("--share", expectedS / scaleS);
    box.append(line, element("p", "wf-note", `expected dense: ${seconds(expectedS)}`));
  }
  const list = stagesOf(report).filter(([, lasted]) => lasted > 0)
    .map(([field, lasted]) => `${STAGES[field]} ${seconds(lasted)}`);
  list.push(`first token ${seconds(report.ttft_s)}`);
  box.append(element("p", "wf-list", list.join(" · ")));
  return box;
}

function bar(field, lasted, scaleS) {
  const one = element("span", `wf-bar ${field}`);
  one.style.setProperty("--share", lasted / scaleS);
  one.title = `${STAGES[field]} ${seconds(lasted)}`;
  return one;
}

function legend() {
  const list = element("ul", "legend wf-legend");
  for (const [field, title] of Object.entries(STAGES)) {
    const item = element("li", "");
    item.append(element("span", `swatch ${field}`), title);
    list.append(item);
  }
  const first = element("li", "");
  first.append(element("span", "swatch wf-tick"), "first token");
  list.append(first);
  return list;
}

export function element(tag, classes, text) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text !== undefined) made.textContent = text;
  return made;
}

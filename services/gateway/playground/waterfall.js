// Draws the seconds of each stage as bars on one scale.

import { STAGES, seconds } from "./words.js";

/** Fills `target` with a row per lane, `{name, report, expectedS}`, and one for what was expected. */
export function drawWaterfall(target, lanes) {
  const totals = lanes.map(({ report }) => stagesOf(report).reduce((sum, [, s]) => sum + s, 0));
  const expectedS = lanes.find((lane) => lane.expectedS !== undefined)?.expectedS;
  const scaleS = Math.max(
    1e-6, ...totals, expectedS ?? 0, ...lanes.map((lane) => lane.report.ttft_s));
  const rows = lanes.map((lane) => row(lane, scaleS));
  if (expectedS !== undefined) rows.push(expectedRow(expectedS, scaleS));
  target.replaceChildren(...rows, legend());
}

const stagesOf = (report) =>
  Object.keys(STAGES).map((field) => [field, Math.max(0, report[field] ?? 0)]);

function row({ name, report }, scaleS) {
  const stages = stagesOf(report).filter(([, lasted]) => lasted > 0);
  const bars = element("div", "wf-bars");
  const mark = element("span", "wf-first");
  mark.style.setProperty("--at", report.ttft_s / scaleS);
  bars.append(...stages.map(([field, lasted]) => bar(field, lasted, scaleS)), mark);
  const listed = stages.map(([field, lasted]) => `${STAGES[field]} ${seconds(lasted)}`);
  listed.push(`first token ${seconds(report.ttft_s)}`);
  return box("wf-row", name, bars, listed.join(" · "));
}

function expectedRow(expectedS, scaleS) {
  const bars = element("div", "wf-bars");
  const expected = element("span", "wf-bar wf-expected");
  expected.style.setProperty("--share", expectedS / scaleS);
  bars.append(expected);
  const words = `first token ${seconds(expectedS)}, on which the plan was decided`;
  return box("wf-row wf-expectation", "Dense, as expected", bars, words);
}

function box(classes, name, bars, words) {
  const made = element("div", classes);
  made.append(element("h3", "wf-name", name), bars, element("p", "wf-list", words));
  return made;
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

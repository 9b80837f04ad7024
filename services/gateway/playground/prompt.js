// Draws a selection: the prompt's text, and its chunks' scores as a strip.

import { highest, isProtected } from "./selection.js";
import { REASONS, spanSentence } from "./words.js";
import { element } from "./waterfall.js";

const STRIP_BARS = 240;
const SVG = "http://www.w3.org/2000/svg";

/** The prompt as focusable spans; redrawn in place when the keep rate changes. */
export class PromptText {
  constructor(target, detail) {
    this.target = target;
    this.detail = detail;
    this.parts = [];
    target.addEventListener("keydown", (event) => this.onKey(event));
    target.addEventListener("focusin", (event) => this.explain(event.target));
    target.addEventListener("mouseover", (event) => this.explain(event.target));
  }

  /** Shows a response of POST /v1/selections. */
  show(view) {
    this.view = view;
    const characters = [...view.text]; // offsets count Unicode characters, as Python does
    const best = highest(view.chunk_scores ?? []);
    this.parts = view.spans.map((span, i) => {
      const text = characters.slice(span.start, span.end).join("");
      const part = element("span", "", text);
      part.dataset.index = i;
      part.tabIndex = i === 0 ? 0 : -1;
      part.setAttribute("aria-describedby", this.detail.id);
      if (best > 0 && !isProtected(span)) {
        part.style.setProperty("--heat", Math.sqrt(view.chunk_scores[span.chunk] / best));
      }
      return part;
    });
    this.target.replaceChildren(...this.parts);
  }

  /** Marks what is kept: `reasons` has a list per span, empty for a dropped one. */
  mark(reasons) {
    this.reasons = reasons;
    this.parts.forEach((part, i) => {
      const kept = reasons[i].length > 0;
      part.className = kept ? `span kept ${reasons[i][0]}` : "span dropped";
      if (kept) part.removeAttribute("role");
      else part.setAttribute("role", "deletion");
      part.title = this.sentence(i);
    });
  }

  /** Scrolls the text, not the page, to the unprotected part of a chunk. */
  reveal(chunk) {
    const spans = this.view.spans;
    const inside = (span) => span.chunk === chunk;
    let i = spans.findIndex((span) => inside(span) && !isProtected(span));
    if (i < 0) i = spans.findIndex(inside);
    if (i < 0) return;
    const [part, box] = [this.parts[i], this.target].map((each) => each.getBoundingClientRect());
    this.target.scrollTop += part.top - box.top - box.height / 3;
  }

  sentence(i) {
    const span = this.view.spans[i];
    const scores = this.view.chunk_scores;
    const shown = scores === null || isProtected(span) ? null : scores[span.chunk];
    return spanSentence(span, this.reasons[i], shown);
  }

  explain(part) {
    if (part.dataset?.index === undefined) return;
    const shown = this.sentence(Number(part.dataset.index));
    if (this.detail.textContent !== shown) this.detail.textContent = shown;
  }

  onKey(event) {
    const now = this.parts.indexOf(document.activeElement);
    const last = this.parts.length - 1;
    const visible = (i) => this.parts[i].offsetParent !== null || this.parts[i].getClientRects().length > 0;
    const seek = (from, step) => {
      let to = from;
      while (to >= 0 && to <= last && !visible(to)) to += step;
      return to;
    };
    const moves = {
      ArrowRight: () => seek(now + 1, 1), ArrowDown: () => seek(now + 1, 1),
      ArrowLeft: () => seek(now - 1, -1), ArrowUp: () => seek(now - 1, -1),
      Home: () => seek(0, 1), End: () => seek(last, -1),
    };
    if (now < 0 || !(event.key in moves)) return;
    event.preventDefault();
    const next = moves[event.key]();
    if (next < 0 || next > last) return;
    this.parts[now].tabIndex = -1;
    this.parts[next].tabIndex = 0;
    this.parts[next].focus();
  }
}

/** Returns the chunk that a click on the strip means. */
export function chunkAt(svg, view, clientX) {
  const box = svg.getBoundingClientRect();
  const chunks = view.chunk_scores.length;
  return Math.min(chunks - 1, Math.max(0, Math.floor(((clientX - box.left) / box.width) * chunks)));
}

/** Draws one bar per chunk (or per few of them): its height is the score, its colour its fate. */
export function drawStrip(svg, view, reasons) {
  const scores = view.chunk_scores;
  svg.toggleAttribute("hidden", scores === null);
  if (scores === null) return;
  const fates = chunkFates(view, reasons, scores.length);
  const group = Math.ceil(scores.length / STRIP_BARS);
  const bars = Math.ceil(scores.length / group);
  const best = highest(scores) || 1;
  svg.setAttribute("viewBox", `0 0 ${bars} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  const title = svg.querySelector("title");
  const drawn = [];
  for (let bar = 0; bar < bars; bar += 1) {
    const inside = [...scores.keys()].slice(bar * group, (bar + 1) * group);
    const fate = ["scored", "protected", "dropped"].find((f) => inside.some((c) => fates[c] === f));
    const tallest = Math.sqrt(highest(inside.map((c) => scores[c])) / best);
    drawn.push(rectangle(bar, Math.max(3, 100 * tallest), `bar ${fate ?? "dropped"}`));
  }
  title.textContent = stripTitle(fates);
  svg.replaceChildren(title, ...drawn);
}

function chunkFates(view, reasons, chunks) {
  const fates = new Array(chunks).fill("dropped");
  view.spans.forEach((span, i) => {
    if (reasons[i].length === 0) return;
    if (!isProtected(span)) fates[span.chunk] = "scored";
    else if (fates[span.chunk] === "dropped") fates[span.chunk] = "protected";
  });
  return fates;
}

function stripTitle(fates) {
  const number = (fate) => fates.filter((each) => each === fate).length;
  return `Scores of ${fates.length} chunks: ${number("scored")} kept for their score, `
    + `${number("protected")} with protected text, ${number("dropped")} dropped`;
}

function rectangle(x, height, classes) {
  const made = document.createElementNS(SVG, "rect");
  const at = { x: x + 0.1, y: 100 - height, width: 0.8, height, class: classes };
  for (const [name, value] of Object.entries(at)) made.setAttribute(name, value);
  return made;
}

/** Lists the reasons that a selection has, with their colours. */
export function drawLegend(target, reasons) {
  const found = new Set(reasons.flatMap((each) => each.slice(0, 1)));
  const items = Object.keys(REASONS).filter((reason) => found.has(reason)).map((reason) => {
    const item = element("li", "");
    item.title = REASONS[reason];
    item.append(element("span", `swatch ${reason}`), reason.replaceAll("_", " "));
    return item;
  });
  if (reasons.some((each) => each.length === 0)) {
    const item = element("li", "");
    item.append(element("span", "swatch dropped"), "dropped");
    items.push(item);
  }
  target.replaceChildren(...items);
}

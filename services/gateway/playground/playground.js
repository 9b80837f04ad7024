// The page: reads the form, asks the service, shows what it answers. It keeps nothing.

import { chromeTrace, curlCommands } from "./export.js";
import { PromptText, chunkAt, drawLegend, drawStrip } from "./prompt.js";
import { highest, isProtected, selectAgain } from "./selection.js";
import { Refusal, call, streamChat } from "./service.js";
import { drawWaterfall, element } from "./waterfall.js";
import { count, percent, planSentence, score, seconds } from "./words.js";

const $ = (id) => document.getElementById(id);
const prompt = new PromptText($("prompt"), $("detail"));
const LANES = ["pruned", "dense"];
const CLOCK_MS = 50;

const state = {
  model: null,
  needsKey: document.body.dataset.needsKey === "true",
  view: null, // the newest response of POST /v1/selections
  asked: null, // the form that it answers
  keep: null, // a number or "auto": what is shown
  shown: null, // the selection at that rate
  lanes: [], // of the newest race
  racing: null, // aborts the race
};

const key = () => $("key").value.trim();

// --- the form ----------------------------------------------------------------------------------

/** Returns the form as a conversation. Throws an Error for a person. */
function readForm() {
  const lines = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);
  const text = $("context").value;
  const question = $("question").value.trim();
  if (!text.trim() && !question) throw new Error("Give a text, a question, or both.");
  const messages = [{ role: "user", content: [text, question].filter((s) => s.trim()).join("\n\n") }];
  const system = $("system").value.trim();
  if (system) messages.unshift({ role: "system", content: system });
  const form = { messages, protect: lines("protect"), maxTokens: Number($("max-tokens").value) || 64 };
  const tools = $("tools").value.trim();
  return tools ? { ...form, tools: parseTools(tools) } : form;
}

function parseTools(text) {
  try {
    const tools = JSON.parse(text);
    if (Array.isArray(tools) && tools.length > 0) return tools;
  } catch {
    // the same message
  }
  throw new Error("Tools: must be a JSON list of tools.");
}

const sliderKeep = () => Number($("keep").value) / 100;

function selectionBody(form, keep) {
  const body = { model: state.model, messages: form.messages, keep };
  if (form.protect.length > 0) body.protect = form.protect;
  if (form.tools) body.tools = form.tools;
  return body;
}

function answerBody(form, control) {
  const body = {
    model: state.model, messages: form.messages, max_tokens: form.maxTokens, temperature: 0,
    specprefill: control,
  };
  if (form.tools) body.tools = form.tools;
  return body;
}

function pruneControl(form, keep) {
  const control = { keep };
  if (form.protect.length > 0) control.protect = form.protect;
  return control;
}

// --- problems ----------------------------------------------------------------------------------

function showProblem(error) {
  if (error.name === "AbortError") return;
  $("problem").textContent = error.message;
  $("problem").hidden = false;
  if (error instanceof Refusal && error.status === 401) $("key").focus();
}

function askForKey() {
  $("model").textContent = "Give your API key to begin.";
  $("key").placeholder = "needed";
  $("key").focus();
}

function clearProblem() {
  $("problem").hidden = true;
}

/** Runs an action of a person; what goes wrong is shown. */
async function attempt(action) {
  clearProblem();
  try {
    await action();
  } catch (error) {
    showProblem(error);
  }
}

async function findModel() {
  const models = await call("v1/models", key());
  const [first] = models.data;
  state.model = first.id;
  const length = first.max_model_len ? ` · up to ${count(first.max_model_len)} tokens` : "";
  $("model").textContent = `${first.id}${length}`;
}

// --- the selection -----------------------------------------------------------------------------

async function select() {
  const form = readForm();
  $("busy").textContent = "Scoring…";
  $("select").disabled = true;
  try {
    if (state.model === null) await findModel();
    const keep = Math.min(sliderKeep(), 0.99); // all of it has no scores
    state.view = await call("v1/selections", key(), selectionBody(form, keep));
    state.asked = form;
  } finally {
    $("busy").textContent = "";
    $("select").disabled = false;
  }
  for (const id of ["selection", "race", "export"]) $(id).hidden = false;
  prompt.show(state.view);
  showFacts();
  showKeep(sliderKeep());
  revealBest();
  $("selection").focus({ preventScroll: true });
  $("selection").scrollIntoView({ block: "start" });
}

function revealBest() {
  const scores = state.view.chunk_scores;
  if (scores !== null) prompt.reveal(scores.indexOf(highest(scores)));
}

/** Returns the reasons of each span at the rate that is shown. */
function reasonsOf(shown) {
  const other = shown.plan === "dense" ? "whole_prompt" : "scored";
  return state.view.spans.map((span, i) => {
    if (!shown.kept[i]) return [];
    return isProtected(span) ? span.reasons : [other];
  });
}

/** Shows the selection at `keep`: the server's own, where there are no scores to select by. */
function showKeep(keep) {
  const view = state.view;
  const scored = view.chunk_scores !== null;
  state.keep = keep;
  state.shown = scored ? selectAgain(view, keep) : asSent(view);
  const shown = state.shown;
  const reasons = scored ? reasonsOf(shown) : view.spans.map((span) => span.reasons);
  prompt.mark(reasons);
  drawStrip($("strip"), view, reasons);
  drawLegend($("legend"), reasons);
  const { plan, reason, keptTokens } = shown;
  $("sentence").textContent = planSentence(plan, reason, keptTokens, view.prompt_tokens);
  $("threshold").textContent = score(shown.threshold);
  $("keep").disabled = $("auto").disabled = !scored;
  $("origin").textContent = scored
    ? "Selected in this browser, from scores that were sent once."
    : "The service sent no scores, so there is nothing to choose.";
  const rate = keep === "auto" ? shown.keep : keep;
  if (keep === "auto") $("keep").value = Math.round(100 * rate);
  $("keep-value").textContent = keep === "auto" ? `auto: ${percent(rate)}` : percent(rate);
  $("keep").setAttribute("aria-valuetext", $("keep-value").textContent);
  if (!$("curl-text").hidden) showCurl();
}

function asSent(view) {
  return {
    plan: view.plan, reason: view.reason, keep: view.keep, threshold: view.threshold,
    kept: view.spans.map((span) => span.kept), keptTokens: view.kept_tokens,
  };
}

function showFacts() {
  const view = state.view;
  const facts = [
    ["Threshold", "", "threshold"],
    ["Certainty", view.certainty === null ? "–" : percent(view.certainty)],
    ["Tokenise", seconds(view.tokenize_s)],
    ["Queue", seconds(view.queue_s)],
    ["Scoring", seconds(view.speculate_s)],
    ["Read before", count(view.remembered_tokens)],
  ];
  if (view.expected_dense_ttft_s !== null) {
    facts.push(["Expected dense", seconds(view.expected_dense_ttft_s)]);
    facts.push(["Expected pruned", seconds(view.expected_prune_ttft_s)]);
  }
  $("facts").replaceChildren(...facts.map(([name, value, id]) => {
    const box = element("div", "");
    const shown = element("dd", "", value);
    if (id) shown.id = id;
    box.append(element("dt", "", name), shown);
    return box;
  }));
}

// --- the race ----------------------------------------------------------------------------------

/** Returns the form with a first line that no cache knows. */
function withOwnLine(form) {
  const word = crypto.getRandomValues(new Uint32Array(1))[0].toString(36);
  const messages = form.messages.map((message) =>
    message.role === "user" ? { ...message, content: `Copy ${word}.\n${message.content}` } : message);
  return { ...form, messages };
}

async function race() {
  const control = new AbortController();
  state.racing = control;
  state.lanes = [];
  $("run").disabled = true;
  $("stop").hidden = false;
  $("trace").disabled = true;
  LANES.forEach(clearLane);
  $("verdict").textContent = "";
  try {
    const form = $("cold").checked ? () => withOwnLine(state.asked) : () => state.asked;
    const runs = {
      pruned: () => runLane("pruned", form(), pruneControl(state.asked, state.keep), control.signal),
      dense: () => runLane("dense", form(), false, control.signal),
    };
    if ($("together").checked) await Promise.all(LANES.map((lane) => runs[lane]()));
    else for (const lane of LANES) await runs[lane]();
  } finally {
    state.racing = null;
    $("run").disabled = false;
    $("stop").hidden = true;
  }
}

function clearLane(lane) {
  $(`${lane}-clock`).textContent = "–";
  for (const part of ["answer", "words"]) $(`${lane}-${part}`).textContent = "";
}

async function runLane(lane, form, control, signal) {
  const started = performance.now();
  const clock = $(`${lane}-clock`);
  let first = null;
  const tick = () => {
    if (first === null) clock.textContent = seconds((performance.now() - started) / 1000);
  };
  const timer = setInterval(tick, CLOCK_MS);
  try {
    const onText = (text) => {
      if (first === null) {
        first = (performance.now() - started) / 1000;
        clock.textContent = seconds(first);
      }
      const answer = $(`${lane}-answer`);
      answer.textContent = (answer.textContent + text).trimStart();
    };
    const outcome = await streamChat(key(), answerBody(form, control), onText, signal);
    if (first === null) clock.textContent = "no text";
    showOutcome(lane, outcome);
  } finally {
    clearInterval(timer);
  }
}

function showOutcome(lane, { report, usage, lastS }) {
  if (!report) return;
  const words = planSentence(report.plan, report.reason, report.kept_tokens, report.prompt_tokens);
  const tokens = usage ? ` ${count(usage.completion_tokens)} answer tokens in ${seconds(lastS)}.` : "";
  $(`${lane}-words`).textContent = words + tokens;
  const name = lane === "pruned" ? "Pruned" : "Dense";
  state.lanes.push({ name, report, expectedS: report.expected_dense_ttft_s });
  state.lanes.sort((a, b) => (a.name < b.name ? 1 : -1));
  drawWaterfall($("waterfall"), state.lanes);
  $("trace").disabled = false;
  $("verdict").textContent = verdict();
}

/** Compares the lanes by the service's own times to the first token. */
function verdict() {
  if (state.lanes.length < 2) return "";
  const [pruned, dense] = state.lanes.map(({ report }) => report.ttft_s);
  const [sooner, times] = pruned <= dense ? ["Pruned", dense / pruned] : ["Dense", pruned / dense];
  return `${sooner} has its first token ${times.toFixed(1)} times as fast.`;
}

// --- export ------------------------------------------------------------------------------------

function showCurl() {
  const form = state.asked;
  const base = new URL(".", document.baseURI).href;
  const answer = answerBody(form, pruneControl(form, state.keep));
  $("curl-text").textContent = curlCommands(
    base, state.needsKey || key() !== "", selectionBody(form, state.keep), answer);
}

function toggleCurl() {
  const open = $("curl-text").hidden;
  if (open) showCurl();
  $("curl-text").hidden = $("copy").hidden = !open;
  $("curl").setAttribute("aria-expanded", String(open));
}

async function copyCurl() {
  const text = $("curl-text");
  try {
    await navigator.clipboard.writeText(text.textContent);
    $("exported").textContent = "Copied.";
  } catch { // no secure context, or not allowed
    getSelection().selectAllChildren(text);
    $("exported").textContent = "Selected: press Ctrl+C.";
  }
}

function saveTrace() {
  const content = JSON.stringify(chromeTrace(state.lanes), null, 1);
  const url = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  const link = element("a", "");
  link.href = url;
  link.download = "specprefill-trace.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000); // the download has started by then
  $("exported").textContent = "Saved specprefill-trace.json: open it in ui.perfetto.dev or chrome://tracing.";
}

async function fillExample() {
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  const example = await call(`playground/example.json?seed=${seed}`, key());
  for (const field of ["system", "context", "question"]) $(field).value = example[field];
  $("max-tokens").value = 24;
}

// --- events ------------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(select);
});
$("example").addEventListener("click", () => attempt(fillExample));
$("keep").addEventListener("input", () => showKeep(sliderKeep()));
$("auto").addEventListener("click", () => showKeep("auto"));
$("only-kept").addEventListener("change", (event) =>
  $("prompt").classList.toggle("only-kept", event.target.checked));
$("strip").addEventListener("click", (event) =>
  prompt.reveal(chunkAt($("strip"), state.view, event.clientX)));
$("run").addEventListener("click", () => attempt(race));
$("stop").addEventListener("click", () => state.racing?.abort());
$("curl").addEventListener("click", toggleCurl);
$("copy").addEventListener("click", copyCurl);
$("trace").addEventListener("click", saveTrace);
$("key").addEventListener("change", () => attempt(findModel));
$("login").addEventListener("submit", (event) => event.preventDefault()); // Enter: a change, too
$("keep-value").textContent = percent(sliderKeep());
if (state.needsKey) askForKey();
else attempt(findModel);

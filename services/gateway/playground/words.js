// Plans, reasons and numbers in words.

const PLANS = {
  asked: "because this keep rate was asked for",
  default: "at the deployment's keep rate",
  auto: "at the keep rate that the scores need",
  carried_over: "because the conversation's last turn kept them, or they are new",
  extended: "because the last turn kept them, they are new, or the new question needs them",
  reselected: "because what the conversation's last turn kept does not serve this one",
  load: "at a rate that was lowered under load",
  asked_off: "because pruning was switched off",
  disabled: "because this deployment prunes only on request",
  dense_mode: "because the model, or selection.mode, lets no prompt be pruned",
  keep_is_one: "because the keep rate keeps every chunk",
  short_prompt: "because the prompt is short",
  no_gain: "because a dense prefill is expected to give the first token sooner",
  prompt_logprobs: "because prompt_logprobs need every token",
  protected_spans: "because what is protected leaves nothing to drop",
  flat_scores: "because no part of the prompt stands out",
  spread_scores: "because what matters is spread over too much of the prompt",
  uncertain: "because what matters is spread out and the speculator is not sure of its answer",
  prompt_too_long_for_speculator: "because the prompt is longer than the speculator can read",
  prompt_too_large_for_speculator: "because the prompt does not fit into the speculator's memory",
  speculator_unavailable: "because no speculator is running",
  speculator_timeout: "because scoring took too long",
  speculator_overloaded: "because the speculator is full",
  speculator_unfit: "because the speculator failed its self-test",
  unsure_answer: "because the main model was unsure how to begin its answer to the pruned prompt",
};

// In the order of the legend. The first of a span's reasons gives its colour.
export const REASONS = {
  system: "a system message",
  tools: "the schemas of the tools",
  protected: "a phrase that you always keep",
  code: "fenced code",
  tail: "the end of the question or of the prompt",
  template: "the chat template's own text",
  sink: "the first tokens, which every later one attends to",
  block: "fills a block of the KV cache behind a protected beginning",
  scored: "its chunk has one of the highest scores",
  static: "chosen without scores, by the words of the question",
  whole_prompt: "the whole prompt is kept",
};

export const STAGES = {
  queue_s: "queue",
  speculate_s: "speculate",
  discarded_s: "discarded prefill",
  prefill_s: "prefill",
  transfer_s: "transfer",
  first_decode_s: "first decode",
};

export const percent = (share) =>
  `${(100 * share).toLocaleString("en", { maximumFractionDigits: share < 0.1 ? 1 : 0 })}\u00a0%`;

export const count = (value) => value.toLocaleString("en");

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1) return `${value.toFixed(2)}\u00a0s`;
  return `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)}\u00a0ms`;
}

export const score = (value) => (value === null ? "–" : Number(value).toPrecision(3));

/** Returns one sentence about a selection or a report. */
export function planSentence(plan, reason, keptTokens, promptTokens) {
  const why = PLANS[reason] ?? `(${reason})`;
  if (plan === "dense") return `Keeps all ${count(promptTokens)} tokens, ${why}.`;
  const share = percent(keptTokens / promptTokens);
  return `Keeps ${count(keptTokens)} of ${count(promptTokens)} tokens (${share}), ${why}.`;
}

/** Returns one sentence about a span. */
export function spanSentence(span, kept, chunkScore) {
  const place = `tokens ${count(span.first_token)}–${count(span.end_token - 1)}`;
  const scored = chunkScore === null ? "" : `, chunk ${span.chunk} scored ${score(chunkScore)}`;
  if (kept.length === 0) return `Dropped: ${place}${scored}.`;
  const why = kept.map((reason) => REASONS[reason] ?? reason).join("; ");
  return `Kept: ${why}. (${place}${scored})`;
}

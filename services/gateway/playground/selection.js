// Selects again at another keep rate, from the scores that the server sent once.
// The rule is the server's: services/core/selection.py. A test compares the two.

const ROUNDING = 1e-9;
const NOT_PROTECTED = new Set(["scored", "static", "whole_prompt"]);

export const isProtected = (span) => span.reasons.some((reason) => !NOT_PROTECTED.has(reason));

/**
 * Returns what a keep rate keeps of a response of POST /v1/selections.
 *
 * `keep` is a number above 0 and at most 1, or "auto". `kept` has one entry per span;
 * `threshold` is the lowest score of a chunk that was kept for its score, or null.
 */
export function selectAgain(view, keep) {
  const sums = countTokens(view);
  const refusal = settle(view, sums, keep);
  if (refusal) return dense(view, refusal);
  const rate = keep === "auto" ? chooseRate(view, sums) : keep;
  if (typeof rate === "string") return dense(view, rate);
  const chosen = chooseChunks(view, sums, rate, keep === "auto");
  const kept = view.spans.map((span, i) => sums.protectedSpans[i] || chosen.has(span.chunk));
  const keptTokens = view.spans.reduce((sum, span, i) => sum + (kept[i] ? length(span) : 0), 0);
  if (view.prompt_tokens - keptTokens < view.rule.chunk_tokens) {
    return dense(view, sums.protectedTokens > 0 ? "protected_spans" : "keep_is_one");
  }
  const threshold = [...chosen].reduce((low, c) => Math.min(low, view.chunk_scores[c]), Infinity);
  const reason = keep === "auto" ? "auto" : "asked";
  return { plan: "prune", reason, keep: rate, kept, keptTokens, threshold };
}

export const highest = (scores) => scores.reduce((a, b) => Math.max(a, b), 0);

const length = (span) => span.end_token - span.first_token;

const ceil = (value) => Math.ceil(value - ROUNDING);

function dense(view, reason) {
  const kept = view.spans.map(() => true);
  return { plan: "dense", reason, keep: 1, kept, keptTokens: view.prompt_tokens, threshold: null };
}

/**
 * Counts what is protected, and the tokens of each chunk: `free` those that are not protected,
 * `whole` all, with a short last chunk as a whole one. `chunks` is the number of chunks of `size`.
 */
function countTokens(view) {
  const size = view.rule.chunk_tokens;
  const chunks = Math.ceil(view.prompt_tokens / size);
  const last = view.spans.at(-1).chunk;
  const free = new Array(last + 1).fill(0);
  const sizes = new Array(last + 1).fill(0);
  const protectedSpans = view.spans.map(isProtected);
  let protectedTokens = 0;
  view.spans.forEach((span, i) => {
    sizes[span.chunk] += length(span);
    if (protectedSpans[i]) protectedTokens += length(span);
    else free[span.chunk] += length(span);
  });
  const whole = sizes.with(last, Math.max(size, sizes[last]));
  const added = free.map((tokens, chunk) => tokens + whole[chunk] - sizes[chunk]);
  return { size, chunks, free, whole, added, protectedSpans, protectedTokens };
}

const requestedChunks = (chunks, keep) => Math.max(1, ceil(chunks * keep));

/** Returns why the prompt is dense whatever its scores are, or null. */
function settle(view, sums, keep) {
  const least = keep === "auto" ? view.rule.floor : keep;
  if (requestedChunks(sums.chunks, least) >= sums.chunks) return "keep_is_one";
  if (view.rule.min_kept_tokens >= view.prompt_tokens) return "short_prompt";
  if (view.prompt_tokens - sums.protectedTokens < sums.size) return "protected_spans";
  return view.rule.is_flat ? "flat_scores" : null;
}

/** Returns the keep rate that the scores need, or the reason to go dense. */
function chooseRate(view, sums) {
  const rule = view.rule;
  const sure = view.certainty >= rule.least_certainty;
  const scores = view.chunk_scores;
  const open = [...scores.keys()].filter((chunk) => sums.free[chunk] > 0);
  open.sort((a, b) => scores[b] - scores[a] || a - b);
  const least = (sure ? rule.peak_share : rule.unsure_share) * scores[open[0]];
  const needed = Math.max(1, open.filter((chunk) => scores[chunk] >= least).length);
  if (needed > rule.most_chunks * open.length) return sure ? "spread_scores" : "uncertain";
  const tokens = open.slice(0, needed).reduce((sum, chunk) => sum + sums.whole[chunk], 0);
  const wanted = (tokens + sums.protectedTokens) / view.prompt_tokens;
  return Math.min(Math.max(wanted, rule.floor), rule.ceiling);
}

/** Returns the fewest chunks of the highest scores that fill the budget; ties go to the later. */
function chooseChunks(view, sums, keep, auto) {
  const least = Math.ceil(view.rule.min_kept_tokens / sums.size);
  const budget = Math.min(sums.chunks, Math.max(requestedChunks(sums.chunks, keep), least));
  const scored = auto ? 1 : Math.ceil(budget / 2);
  const missing = Math.max(budget * sums.size - sums.protectedTokens, scored * sums.size);
  const scores = view.chunk_scores;
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || b - a);
  const chosen = new Set();
  let filled = 0;
  for (const chunk of order.filter((each) => sums.free[each] > 0)) {
    if (filled >= missing) break;
    chosen.add(chunk);
    filled += sums.added[chunk];
  }
  return chosen;
}

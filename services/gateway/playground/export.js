// What a person takes along: curl commands, and a trace for Chrome's viewer or Perfetto.

import { STAGES } from "./words.js";

/** Returns commands that select and answer. The key stays out of them. */
export function curlCommands(base, needsKey, selection, answer) {
  return [
    "# what would be kept, and why",
    curl(`${base}v1/selections`, needsKey, selection),
    "",
    "# the answer",
    curl(`${base}v1/chat/completions`, needsKey, answer),
  ].join("\n");
}

function curl(url, needsKey, body) {
  const key = needsKey ? ` \\\n  -H "authorization: Bearer $SPECPREFILL_API_KEY"` : "";
  // JSON holds no line break and no line that is the mark: the shell reads it as it is.
  return `curl ${url} -H 'content-type: application/json'${key} \\
  --data-binary @- <<'END'
${JSON.stringify(body)}
END`;
}

/** Returns the lanes of a race in Chrome's trace event format; times are microseconds. */
export function chromeTrace(lanes) {
  return { displayTimeUnit: "ms", traceEvents: lanes.flatMap(laneEvents) };
}

function laneEvents({ name, report, expectedS }, index) {
  const pid = index + 1;
  const event = (title, startS, durationS, args) => ({
    name: title, ph: "X", cat: "specprefill", pid, tid: 1,
    ts: Math.round(startS * 1e6), dur: Math.round(durationS * 1e6), args,
  });
  const named = { name: "process_name", ph: "M", pid, tid: 1, args: { name } };
  let atS = 0;
  // Few requests prefill in vain; the other stages are shown even where they took no time.
  const had = ([field]) => field !== "discarded_s" || report[field] > 0;
  const stages = Object.entries(STAGES).filter(had).map(([field, title]) => {
    const startS = atS;
    atS += report[field];
    return event(title, startS, report[field], {});
  });
  const whole = { ...event("first token", 0, report.ttft_s, report), tid: 2 };
  const expected = expectedS === undefined ? []
    : [{ ...event("expected dense", 0, expectedS, {}), tid: 3 }];
  return [named, ...stages, whole, ...expected];
}

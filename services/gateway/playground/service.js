// Calls to the service: JSON in, JSON or a stream of events out.

/** A refusal of the service, in its own words. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Sends JSON (or nothing) and returns the response. Throws Refusal. */
async function send(path, key, body, signal) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key) headers.authorization = `Bearer ${key}`;
  const method = body === undefined ? "GET" : "POST";
  const sent = body === undefined ? undefined : JSON.stringify(body);
  const response = await fetch(path, { method, headers, body: sent, signal });
  if (response.ok) return response;
  throw new Refusal(response.status, await problemOf(response));
}

async function problemOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The service answered ${response.status}.`;
  }
}

export async function call(path, key, body, signal) {
  return (await send(path, key, body, signal)).json();
}

/**
 * Streams one chat answer. Calls `onText(text)` for each new text.
 *
 * Returns the report of the last event (undefined: there was none) and the seconds to the first
 * and the last text, as this browser measured them.
 */
export async function streamChat(key, body, onText, signal) {
  const started = performance.now();
  const elapsed = () => (performance.now() - started) / 1000;
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("v1/chat/completions", key, request, signal);
  const outcome = { report: undefined, usage: undefined, firstS: null, lastS: null };
  for await (const event of events(response.body)) {
    if (event.error) throw new Refusal(500, event.error.message);
    const text = event.choices?.[0]?.delta?.content;
    if (text) {
      outcome.firstS ??= elapsed();
      outcome.lastS = elapsed();
      onText(text);
    }
    outcome.report = event.specprefill ?? outcome.report;
    outcome.usage = event.usage ?? outcome.usage;
  }
  return outcome;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

/** The service that this page came from: what it serves, and samples as they come about. */

/** The service's own words for why it doesn't answer. */
export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** One block after the other of a stream of server-sent events, however its chunks are cut. */
export class EventParser {
  #rest = "";

  /** The events `{type, data}` that `text`, the next piece of the stream, completes. */
  push(text) {
    const all = this.#rest + text;
    // A carriage return at the end may be the first half of a line's end.
    const whole = all.endsWith("\r") ? all.length - 1 : all.length;
    const blocks = all.slice(0, whole).replace(/\r\n?/g, "\n").split("\n\n");
    this.#rest = blocks.pop() + all.slice(whole);
    return blocks.map(parsed).filter((event) => event.data !== "");
  }
}

function parsed(block) {
  let type = "message";
  const data = [];
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "event") type = value;
    if (name === "data") data.push(value); // a line that begins with a colon has no name: a comment
  }
  return { type, data: data.join("\n") };
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function reached(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The service can’t be reached.");
  }
  if (response.ok) return response;
  const wait = response.headers.get("retry-after");
  const why = await reason(response);
  throw new Refused(response.status, wait && !why.includes(`${wait} s`) ? `${why}: try again in ${wait} s` : why);
}

/** What an answer that is none says; errors have the form `{detail}`, or OpenAI's `{error: {message}}`. */
async function reason(response) {
  const text = await response.text();
  try {
    const tree = JSON.parse(text);
    const detail = tree.detail ?? tree.error?.message;
    if (typeof detail === "string") return detail;
  } catch {
    // Not from the service itself, but from something in between.
  }
  return `The service answered ${response.status} ${response.statusText}`.trim();
}

/** JSON at an address of the service. Throws `Refused`. */
export async function read(address, key) {
  return (await reached(address, { headers: headers(key) })).json();
}

/**
 * The events of a request for samples, in order: begun, steps, done.
 *
 * Throws `Refused` for an error, before or within the stream, and for a stream that ends too early; an AbortError once
 * `signal` says so.
 */
export async function* sample(body, key, signal) {
  const response = await reached("v1/samples", {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refused(0, "The connection ended before the samples were complete.");
      for (const { type, data } of parser.push(value)) {
        signal.throwIfAborted(); // what has come is not told to who wants no more
        const event = { ...JSON.parse(data), type };
        if (type === "error") throw new Refused(event.status, event.detail);
        yield event;
        if (type === "done") return;
      }
    }
  } catch (error) {
    if (error instanceof TypeError && !signal.aborted) throw new Refused(0, "The connection to the service was lost.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

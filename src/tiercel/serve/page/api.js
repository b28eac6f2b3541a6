// The server's routes.

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
  if (rest.trim()) yield JSON.parse(rest);
}

async function call(path, body, signal) {
  let reply;
  try {
    reply = await fetch(path, body === undefined ? {} : { method: "POST", body: JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  }
  if (reply.ok) return reply;
  let text = reply.statusText || `status ${reply.status}`;
  try {
    const { error } = await reply.json();
    text = error?.message || error || text;
  } catch { /* no JSON: the status says it */ }
  throw new Error(text);
}

export const tags = async () => (await (await call("api/tags")).json()).models;
export const ps = async () => (await (await call("api/ps")).json()).models;
export const show = async (model) => (await call("api/show", { model })).json();

// Lines of a route that streams; an `error` line is thrown.
export async function* stream(path, body, signal) {
  const reply = await call(path, { ...body, stream: true }, signal);
  for await (const line of lines(reply.body)) {
    if (line.error) throw new Error(line.error.message || line.error);
    yield line;
  }
}

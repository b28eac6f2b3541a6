// Conversations out of the page and into it, and files into a message.

import { newId } from "./dom.js";
import { path, wholeText } from "./tree.js";

const FORMAT = "tiercel-conversations", VERSION = 1;
const MAX_FILE_BYTES = 1_000_000;
const MARK = /^(\\*)<!-- tiercel:/gm, LINE = /^<!-- tiercel:(title|system|user|reasoning|assistant) -->$/;
const STATES = ["done", "cut", "stopped", "interrupted", "error"];

export const toJSON = (entries) => JSON.stringify({ format: FORMAT, version: VERSION, conversations: entries }, null, 1);

// The branch that is shown. Each part begins with a comment of a line, by which `fromMarkdown` reads it again.
export function toMarkdown(conversation, turns) {
  const part = (name, heading, text) => `<!-- tiercel:${name} -->\n${heading}${text.replace(MARK, "\\$1<!-- tiercel:")}\n`;
  const parts = [part("title", "", `# ${conversation.name}`)];
  if (conversation.settings.system?.trim()) parts.push(part("system", "## System\n\n", conversation.settings.system));
  for (const turn of path(turns, conversation.head)) {
    if (turn.thinking) parts.push(part("reasoning", "## Reasoning\n\n", turn.thinking));
    parts.push(turn.role === "user" ? part("user", "## User\n\n", wholeText(turn)) : part("assistant", "## Assistant\n\n", turn.content));
  }
  return parts.join("\n");
}

const string = (value, otherwise = "") => (typeof value === "string" ? value : otherwise);
const number = (value, otherwise) => (Number.isFinite(value) ? value : otherwise);

function settingsOf(found) {
  const settings = {};
  for (const [key, value] of Object.entries(found || {})) if (["string", "boolean"].includes(typeof value)) settings[key] = value;
  return settings;
}

// Text of a file → [{conversation, turns}].  Throws an Error with one line.
export function read(name, text) {
  if (/^\s*<!-- tiercel:title -->/.test(text)) return [fromMarkdown(text)];
  let found;
  try { found = JSON.parse(text); } catch { throw new Error(`${name} is neither JSON nor Markdown that was exported here.`); }
  if (found?.format !== FORMAT || !Array.isArray(found.conversations)) throw new Error(`${name} holds no conversations of this page.`);
  if (found.version !== VERSION) throw new Error(`${name} has version ${found.version}; this page reads ${VERSION}.`);
  return found.conversations.map(fromJSON);
}

function fromJSON({ conversation = {}, turns = [] }) {
  const id = string(conversation.id, newId()), now = Date.now();
  const rows = (Array.isArray(turns) ? turns : []).filter((turn) => typeof turn?.id === "string").map((turn, index) => ({
    id: turn.id, conversation: id, parent: string(turn.parent, null), role: turn.role === "user" ? "user" : "assistant",
    content: string(turn.content), thinking: string(turn.thinking), state: STATES.includes(turn.state) ? turn.state : "done",
    created: number(turn.created, now + index), model: string(turn.model), error: string(turn.error) || undefined,
    files: Array.isArray(turn.files) ? turn.files.map((f) => ({ name: string(f?.name, "file"), text: string(f?.text) })) : undefined,
    figures: figuresOf(turn.figures),
  }));
  return { conversation: { id, name: string(conversation.name, "Imported").slice(0, 80), model: string(conversation.model), settings: settingsOf(conversation.settings),
    head: string(conversation.head, rows.at(-1)?.id ?? null), created: number(conversation.created, now), updated: number(conversation.updated, now) }, turns: rows };
}

function figuresOf(found) {
  if (!found || typeof found !== "object") return undefined;
  return Object.fromEntries(["tokens", "seconds", "rate", "prompt", "cached"].map((key) => [key, number(found[key], 0)]));
}

function fromMarkdown(text) {
  const id = newId(), now = Date.now(), turns = [];
  const conversation = { id, name: "Imported", model: "", settings: {}, head: null, created: now, updated: now };
  const parts = [];
  for (const line of text.split(/\r?\n/)) {
    const mark = LINE.exec(line);
    if (mark) parts.push({ kind: mark[1], lines: [] });
    else parts.at(-1)?.lines.push(line.replace(/^\\(\\*<!-- tiercel:)/, "$1"));
  }
  let thinking = "";
  for (const { kind, lines } of parts) {
    if (lines.at(-1) === "") lines.pop(); // of the blank line between parts, or of the end of the file
    const body = kind === "title" ? lines.join("\n") : lines.slice(2).join("\n");
    if (kind === "title") conversation.name = body.replace(/^# /, "").trim().slice(0, 80) || "Imported";
    else if (kind === "system") conversation.settings.system = body;
    else if (kind === "reasoning") thinking = body;
    else {
      turns.push({ id: newId(), conversation: id, parent: turns.at(-1)?.id ?? null, role: kind, content: body, thinking: kind === "assistant" ? thinking : "",
        state: "done", created: now + turns.length });
      thinking = "";
    }
  }
  conversation.head = turns.at(-1)?.id ?? null;
  return { conversation, turns };
}

// A file as {name, text}.  Throws an Error with one line.
export async function textFile(file) {
  if (file.size > MAX_FILE_BYTES) throw new Error(`${file.name} has ${Math.ceil(file.size / 1e6)} MB; a file may have 1 MB.`);
  const bytes = await file.arrayBuffer();
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    if (text.includes("\0")) throw new Error();
    return { name: file.name, text };
  } catch {
    throw new Error(`${file.name} is no text in UTF-8.`);
  }
}

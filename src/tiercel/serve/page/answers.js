// Answers that are being written: each goes on whatever is shown, and is saved as it comes.

import * as api from "./api.js";
import { newId } from "./dom.js";
import { TAB, announce, conversations, listen, orphans, putTurn, turnsOf } from "./store.js";
import { messagesOf, path } from "./tree.js";

const SAVE_MILLISECONDS = 200;
const MAX_RESUMES = 3; // of one turn: an answer that ends the page must not do so for ever

const running = new Map(); // turn id → {abort, keep}
let leaving = false;
let changed = () => {};

export const isRunning = (turn) => running.has(turn.id) || turn.state === "running";

// change(turn, over): called at every piece, and once more when the answer is over.
export function onChange(change) { changed = change; }

export function newTurn(conversation, parent, role, fields = {}) {
  return { id: newId(), conversation, parent, role, content: "", thinking: "", state: "done", created: Date.now(), ...fields };
}

// Options of a request from the texts of the settings.
export function optionsOf(settings, thinks) {
  const options = {};
  for (const name of ["temperature", "top_p", "top_k", "min_p", "seed", "num_predict", "thinking_budget"]) {
    const text = String(settings[name] ?? "").trim();
    if (text !== "" && Number.isFinite(Number(text)) && (name !== "thinking_budget" || thinks)) options[name] = Number(text);
  }
  return options;
}

// Fills `turn`, an assistant's; what it holds already is continued.
export async function answer(turn, thinks) {
  const conversation = conversations.get(turn.conversation);
  if (!conversation || running.has(turn.id)) return;
  const controller = new AbortController();
  let saved = -1;
  const keep = () => {
    const length = turn.content.length + turn.thinking.length;
    if (saved !== length) putTurn(turn);
    saved = length;
  };
  running.set(turn.id, { abort: () => controller.abort(), keep });
  Object.assign(turn, { state: "running", owner: TAB, model: conversation.model, error: undefined });
  await putTurn(turn);
  changed(turn, false);
  const turns = await turnsOf(turn.conversation);
  const body = { model: turn.model, messages: messagesOf(path(turns, turn.id), conversation.settings.system),
    options: optionsOf(conversation.settings, thinks) };
  if (thinks) body.think = conversation.settings.think !== false;
  const save = setInterval(keep, SAVE_MILLISECONDS);
  try {
    turn.state = await read(turn, api.stream("api/chat", body, controller.signal)) || "interrupted";
  } catch (error) {
    if (leaving) return; // it stays "running" for the next page, which resumes it
    turn.state = error.name === "AbortError" ? "stopped" : "error";
    if (turn.state === "error") turn.error = error.message;
  } finally {
    clearInterval(save);
    running.delete(turn.id);
  }
  await putTurn(turn);
  changed(turn, true);
}

async function read(turn, lines) {
  let state = "";
  for await (const line of lines) {
    turn.content += line.message.content;
    turn.thinking += line.message.thinking || "";
    if (line.done) {
      const seconds = line.eval_duration / 1e9;
      turn.figures = { tokens: line.eval_count, seconds, rate: seconds > 0 ? line.eval_count / seconds : 0,
        prompt: line.prompt_eval_count, cached: line.cached_tokens || 0 };
      state = line.done_reason === "length" ? "cut" : "done";
    }
    changed(turn, false);
  }
  return state;
}

export function stop(turn) {
  if (running.has(turn.id)) running.get(turn.id).abort();
  else announce({ kind: "stop", turn: turn.id });
}

// Goes on with what tabs that were closed or crashed left unfinished. resumed(turn, before): `before` was replaced.
export async function resume(thinksOf, resumed) {
  for (const turn of await orphans()) {
    const count = (turn.resumes || 0) + 1;
    if (count > MAX_RESUMES) continue;
    let next = { ...turn, resumes: count };
    if (turn.thinking && !turn.content) { // a template continues text, not reasoning: another answer beside this one
      next = newTurn(turn.conversation, turn.parent, "assistant", { resumes: count });
    }
    const conversation = conversations.get(turn.conversation);
    if (!conversation) continue;
    await resumed(next, turn);
    answer(next, await thinksOf(conversation.model));
  }
}

listen((message) => {
  if (message.kind === "stop") running.get(message.turn)?.abort();
  if (message.kind === "turn" && message.value.owner !== TAB) running.get(message.value.id)?.abort(); // another tab has it
});
addEventListener("pagehide", () => {
  leaving = true;
  for (const one of running.values()) one.keep();
});
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); }); // its streams have ended

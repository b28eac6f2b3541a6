// The list of conversations and the search in it.

import { $, button, make } from "./dom.js";
import { allTurns, conversations, putConversation } from "./store.js";

const SNIPPET = 34; // characters before a found word

let found = null; // id → snippet, while something is searched

export const sorted = () => [...conversations.values()].sort((a, b) => b.created - a.created || (a.id < b.id ? -1 : 1));

export async function search(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) { found = null; return; }
  const hits = new Map();
  for (const one of conversations.values()) if (one.name.toLowerCase().includes(wanted)) hits.set(one.id, "");
  for (const turn of await allTurns()) {
    if (hits.has(turn.conversation)) continue;
    const place = turn.content.toLowerCase().indexOf(wanted);
    if (place >= 0) hits.set(turn.conversation, turn.content.slice(Math.max(0, place - SNIPPET), place + wanted.length + 2 * SNIPPET));
  }
  found = hits;
}

// here: id that is shown.  busy: ids with an answer that is being written.  actions: {open, remove}.
export function drawTalks(here, busy, actions, renaming) {
  const focused = document.activeElement?.dataset?.id;
  const list = sorted().filter((one) => !found || found.has(one.id));
  $("talks").replaceChildren(...list.map((one) => {
    const row = make("li", { className: one.id === here ? "here" : "" });
    if (one.id === renaming) { row.append(renameField(one, here, busy, actions)); return row; }
    const name = make("button", { className: "name", type: "button", onclick: () => actions.open(one.id) }, one.name);
    if (found?.get(one.id)) name.append(make("small", { textContent: found.get(one.id) }));
    name.dataset.id = one.id;
    if (one.id === here) name.setAttribute("aria-current", "true");
    if (busy.has(one.id)) row.append(make("span", { className: "busy", role: "img", ariaLabel: "Answering" }));
    row.append(name, button("✎", () => drawTalks(here, busy, actions, one.id), { className: "icon", ariaLabel: `Rename ${one.name}` }),
      button("✕", () => actions.remove(one), { className: "icon", ariaLabel: `Delete ${one.name}` }));
    return row;
  }));
  if (found && !list.length) $("talks").append(make("li", { className: "note", textContent: "Nothing found." }));
  if (focused) document.querySelector(`#talks [data-id="${CSS.escape(focused)}"]`)?.focus();
}

function renameField(one, here, busy, actions) {
  const field = make("input", { value: one.name, ariaLabel: "Name of the conversation", maxLength: 80 });
  let done = false;
  const end = (save) => {
    if (done) return;
    done = true;
    if (save && field.value.trim()) putConversation({ ...one, name: field.value.trim() });
    drawTalks(here, busy, actions);
    document.querySelector(`#talks [data-id="${CSS.escape(one.id)}"]`)?.focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") { event.stopPropagation(); end(false); }
  });
  field.addEventListener("blur", () => end(true));
  queueMicrotask(() => { field.focus(); field.select(); });
  return field;
}

// What is kept: conversations and turns in IndexedDB; every write is announced to the other tabs.
//
//   conversation  {id, name, model, settings, head, created, updated}     head: id of the last turn that is shown
//   turn          {id, conversation, parent, role, content, thinking, state, created, owner?, figures?, error?, files?, model?}
//   state         running | done | cut (by the limit) | stopped | interrupted | error
//
// The turns of a conversation are a tree: an edit or another answer is a sibling. A turn is a record of its own, so two
// tabs that write to one conversation do not overwrite each other. Only the tab named `owner` writes a running turn.

import { newId } from "./dom.js";

export const TAB = newId();
const NAME = "tiercel", OLD_KEY = "tiercel.conversations";
const channel = new BroadcastChannel(NAME);
const heard = []; // functions (message)
const aliveTabs = new Set();
let db = null, onFailure = () => {};

export const conversations = new Map(); // id → conversation
const loadedTurns = new Map(); // conversation id → Map of turns

export const announce = (message) => channel.postMessage(message);
export const listen = (hear) => heard.push(hear);

channel.onmessage = ({ data }) => {
  if (data.kind === "conversation") conversations.set(data.value.id, data.value);
  if (data.kind === "turn") loadedTurns.get(data.value.conversation)?.set(data.value.id, data.value);
  if (data.kind === "removed") forget(data.id);
  if (data.kind === "who") announce({ kind: "alive", owner: TAB });
  if (data.kind === "alive") aliveTabs.add(data.owner);
  for (const hear of heard) hear(data);
};

const settled = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
const ended = (transaction) => new Promise((resolve, reject) => {
  transaction.oncomplete = () => resolve();
  transaction.onabort = transaction.onerror = () => reject(transaction.error);
});

// Opens the database and reads the conversations. fail(text): called when something cannot be kept.
export async function open(fail) {
  onFailure = fail;
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      const turns = request.result.createObjectStore("turns", { keyPath: "id" });
      turns.createIndex("conversation", "conversation");
      turns.createIndex("state", "state");
    };
    db = await settled(request);
    db.onversionchange = () => db.close();
    for (const one of await settled(db.transaction("conversations").objectStore("conversations").getAll())) {
      conversations.set(one.id, one);
    }
    await moveOld();
  } catch (error) {
    db = null;
    onFailure(`This browser keeps nothing here (${error.message}): export what should stay.`);
  }
}

// The conversations of the page's first form, which were in localStorage.
async function moveOld() {
  const kept = JSON.parse(localStorage.getItem(OLD_KEY) || "null");
  if (!Array.isArray(kept?.talks)) return;
  const now = Date.now();
  for (const [index, talk] of kept.talks.entries()) {
    const one = { id: talk.id, name: String(talk.name), model: talk.model, settings: {}, head: null, created: now - index, updated: now - index };
    let parent = null;
    const turns = (talk.turns || []).map((turn, place) => {
      const found = { id: `${talk.id}-${place}`, conversation: talk.id, parent, role: turn.role, content: turn.content || "",
        thinking: turn.thinking || "", state: turn.stopped ? "stopped" : turn.short ? "cut" : turn.error ? "error" : "done",
        created: now - 1000 + place, figures: turn.figures, error: turn.error };
      parent = found.id;
      return found;
    });
    await putAll({ ...one, head: parent }, turns);
  }
  localStorage.removeItem(OLD_KEY);
}

async function write(names, use) {
  if (!db) return;
  try {
    const transaction = db.transaction(names, "readwrite");
    use(...names.map((name) => transaction.objectStore(name)));
    await ended(transaction);
  } catch (error) {
    const full = error?.name === "QuotaExceededError";
    onFailure(full ? "The browser's storage is full: export and delete old conversations." : `Not kept: ${error?.message}`);
  }
}

export async function putConversation(value) {
  conversations.set(value.id, value);
  announce({ kind: "conversation", value });
  await write(["conversations"], (store) => store.put(value));
}

export async function putTurn(value) {
  if (!conversations.has(value.conversation)) return; // deleted meanwhile
  loadedTurns.get(value.conversation)?.set(value.id, value);
  announce({ kind: "turn", value });
  await write(["turns"], (store) => store.put(value));
}

export async function putAll(conversation, turns) {
  conversations.set(conversation.id, conversation);
  const loaded = loadedTurns.get(conversation.id) || new Map();
  for (const turn of turns) loaded.set(turn.id, turn);
  if (!db) loadedTurns.set(conversation.id, loaded);
  await write(["conversations", "turns"], (first, second) => {
    first.put(conversation);
    for (const turn of turns) second.put(turn);
  });
  announce({ kind: "conversation", value: conversation });
  for (const value of turns) announce({ kind: "turn", value });
}

// The turns of a conversation by id; the map is shared and stays up to date.
export async function turnsOf(id) {
  let found = loadedTurns.get(id);
  if (!found) {
    const rows = db ? await settled(db.transaction("turns").objectStore("turns").index("conversation").getAll(id)) : [];
    found = loadedTurns.get(id) || new Map(rows.map((turn) => [turn.id, turn]));
    loadedTurns.set(id, found);
  }
  return found;
}

export async function allTurns() {
  return db ? settled(db.transaction("turns").objectStore("turns").getAll()) : [...loadedTurns.values()].flatMap((m) => [...m.values()]);
}

function forget(id) {
  conversations.delete(id);
  loadedTurns.delete(id);
}

export async function remove(id) {
  const turns = await turnsOf(id);
  const ids = [...turns.keys()];
  forget(id);
  announce({ kind: "removed", id });
  await write(["conversations", "turns"], (first, second) => {
    first.delete(id);
    for (const turn of ids) second.delete(turn);
  });
}

// Turns that were being answered by tabs that are gone. Each is given to one of the tabs that ask.
export async function orphans() {
  if (!db) return [];
  const running = await settled(db.transaction("turns").objectStore("turns").index("state").getAll("running"));
  if (!running.some((turn) => turn.owner !== TAB)) return [];
  aliveTabs.clear();
  announce({ kind: "who" });
  await new Promise((resolve) => setTimeout(resolve, 300));
  const found = [];
  for (const turn of running) {
    if (turn.owner === TAB || aliveTabs.has(turn.owner)) continue;
    const store = db.transaction("turns", "readwrite").objectStore("turns");
    const now = await settled(store.get(turn.id));
    if (!now || now.state !== "running" || now.owner !== turn.owner) continue;
    const mine = { ...now, owner: TAB, state: "interrupted" };
    await settled(store.put(mine));
    loadedTurns.get(mine.conversation)?.set(mine.id, mine);
    announce({ kind: "turn", value: mine });
    found.push(mine);
  }
  return found;
}

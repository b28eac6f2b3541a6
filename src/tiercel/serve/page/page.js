// The chat page: what is shown, and what its buttons do.  store.js keeps it, answers.js asks the server.

import * as answers from "./answers.js";
import { $, download, make, newId, say } from "./dom.js";
import { loadModels, models, setUpPull, showContext, showMemory, showModel, thinks } from "./models.js";
import { TAB, allTurns, conversations, listen, open, putAll, putConversation, remove, turnsOf } from "./store.js";
import { drawTalks, search, sorted } from "./talks.js";
import { children, newest, path } from "./tree.js";
import { read, textFile, toJSON, toMarkdown } from "./transfer.js";
import { TurnView, fileView } from "./turn.js";

const SETTINGS = ["system", "temperature", "top_p", "top_k", "min_p", "seed", "num_predict", "thinking_budget"];
const DEFAULTS_KEY = "tiercel.settings", HERE_KEY = "tiercel.here";
const FOLLOW_PIXELS = 160; // from the end of the conversation, within which the page follows it

const parsed = (text) => { try { return JSON.parse(text) || {}; } catch { return {}; } };
const defaults = parsed(localStorage.getItem(DEFAULTS_KEY));
let here = null; // id of the conversation that is shown
let attached = [];
let following = true;
const busy = new Set(); // ids of conversations whose answer is being written
let views = new Map(); // turn id → TurnView

// ── settings

function readSettings() {
  const settings = { think: $("think").checked };
  for (const id of SETTINGS) if ($(id).value.trim() !== "") settings[id] = $(id).value;
  return settings;
}

function writeSettings(settings) {
  for (const id of SETTINGS) $(id).value = settings[id] ?? "";
  $("think").checked = settings.think !== false;
}

function settingsChanged() {
  const { system, ...others } = readSettings();
  localStorage.setItem(DEFAULTS_KEY, JSON.stringify({ ...others, model: $("model").value }));
  const conversation = conversations.get(here);
  if (conversation) putConversation({ ...conversation, settings: { ...others, ...(system ? { system } : {}) }, model: $("model").value });
}

// ── drawing

const actions = { edit, regenerate, continue: (turn) => begin(turn), branch: async (turn, to) => {
  const turns = await turnsOf(turn.conversation);
  show(turn.conversation, newest(turns, children(turns, turn.parent)[to].id));
} };

const drawList = () => drawTalks(here, busy, { open: (id) => { go(id); closeSide(); }, remove: ask });

async function drawLog() {
  const id = here, log = $("log"), turns = id ? await turnsOf(id) : new Map();
  if (id !== here) return;
  const shown = path(turns, conversations.get(id)?.head);
  const next = new Map();
  for (const turn of shown) next.set(turn.id, views.get(turn.id) || new TurnView(turn, actions));
  views = next;
  for (const turn of shown) fill(turn, shown, turns);
  const nodes = shown.length ? shown.map((turn) => views.get(turn.id).node) : [make("p", { className: "empty", textContent: "Nothing has been said yet." })];
  if (nodes.length !== log.childNodes.length || nodes.some((node, index) => node !== log.childNodes[index])) log.replaceChildren(...nodes);
  drawBusy(shown);
  const last = shown.findLast((turn) => turn.figures);
  showContext(last ? last.figures.prompt + last.figures.tokens : null);
  if (following) log.scrollTop = log.scrollHeight;
}

function fill(turn, shown, turns) {
  const beside = children(turns, turn.parent);
  return views.get(turn.id)?.update(turn, { busy: answers.isRunning(turn), siblings: beside.length, place: beside.findIndex((one) => one.id === turn.id),
    last: shown.at(-1).id === turn.id, blocked: shown.some(answers.isRunning) });
}

function drawBusy(shown) {
  const on = shown.some(answers.isRunning);
  if ($("stop").hidden === !on) return;
  const focused = document.activeElement === $("stop");
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("log").setAttribute("aria-busy", String(on));
  if (!on && (focused || document.activeElement === document.body)) $("input").focus();
}

// One frame for all pieces that came since the last one.
const dirty = new Map();
let frame = 0;
function drawSoon(turn) {
  dirty.set(turn.id, turn);
  frame ||= requestAnimationFrame(async () => {
    frame = 0;
    const changed = [...dirty.values()].filter((one) => one.conversation === here && views.has(one.id));
    dirty.clear();
    if (!changed.length) return;
    const turns = await turnsOf(here), shown = path(turns, conversations.get(here)?.head);
    for (const one of changed) if (fill(turns.get(one.id) || one, shown, turns)) drawSoon(one);
    if (following) $("log").scrollTop = $("log").scrollHeight;
  });
}

function turnChanged(turn, over) {
  const was = busy.has(turn.conversation);
  over ? busy.delete(turn.conversation) : busy.add(turn.conversation);
  if (was !== busy.has(turn.conversation)) drawList();
  if (turn.conversation !== here) return;
  if (over || !views.has(turn.id)) drawLog();
  else drawSoon(turn);
}

answers.onChange((turn, over) => {
  turnChanged(turn, over);
  if (over) showMemory().then(drawLog);
  if (over) say(turn.error ? `The answer failed: ${turn.error}` : turn.state === "stopped" ? "Stopped." : "The answer is complete.");
});

listen((message) => { // other tabs
  if (message.kind === "turn") turnChanged(message.value, message.value.state !== "running");
  if (message.kind === "conversation") {
    drawList();
    if (message.value.id === here) drawLog();
  }
  if (message.kind === "removed") {
    drawList();
    if (message.id === here) go(null);
  }
});

// ── conversations

function go(id) {
  if (id === here && id) return;
  here = id;
  following = true;
  sessionStorage.setItem(HERE_KEY, id || "");
  localStorage.setItem(HERE_KEY, id || "");
  const conversation = conversations.get(id);
  if (conversation) {
    writeSettings(conversation.settings);
    if (models.some((model) => model.name === conversation.model)) $("model").value = conversation.model;
    showModel();
  } else {
    $("system").value = "";
  }
  drawList();
  drawLog();
}

async function show(id, head) {
  const conversation = conversations.get(id);
  if (conversation) await putConversation({ ...conversation, head });
  drawLog();
}

async function ask(one) {
  if (!confirm(`Delete “${one.name}”?`)) return;
  for (const turn of (await turnsOf(one.id)).values()) if (answers.isRunning(turn)) answers.stop(turn);
  busy.delete(one.id);
  await remove(one.id);
  if (one.id === here) go(null);
  drawList();
  $("new").focus();
}

// ── asking

async function begin(turn) {
  const conversation = conversations.get(turn.conversation);
  await putConversation({ ...conversation, settings: readSettings(), model: $("model").value });
  following = true;
  say("The model is answering.");
  answers.answer(turn, await thinks($("model").value));
}

async function add(conversation, parent, user) {
  const turns = await turnsOf(conversation.id), added = [];
  if (user) added.push({ ...user, parent });
  const turn = answers.newTurn(conversation.id, user ? user.id : parent, "assistant", { state: "running", owner: TAB, created: Date.now() + 1 });
  await putAll({ ...conversation, head: turn.id }, [...added, turn]);
  drawList();
  await begin(turns.get(turn.id) || turn);
}

async function send() {
  const text = $("input").value.trim();
  if ((!text && !attached.length) || !$("stop").hidden) return;
  const model = $("model").value;
  if (!model) return say("There is no model to ask: get one with the button beside the list.", true);
  const now = Date.now();
  const conversation = conversations.get(here) || { id: newId(), name: (text || attached[0].name).split("\n")[0].slice(0, 48), model,
    settings: readSettings(), head: null, created: now, updated: now };
  const user = answers.newTurn(conversation.id, null, "user", { content: text, ...(attached.length ? { files: attached } : {}) });
  attached = [];
  drawAttached();
  $("input").value = "";
  grow();
  if (!here) {
    conversations.set(conversation.id, conversation);
    go(conversation.id);
    navigator.storage?.persist?.(); // the browser should not clear it when space runs short
  }
  following = true;
  await add(conversation, conversation.head, user);
}

async function regenerate(turn) {
  await add(conversations.get(turn.conversation), turn.parent, null);
}

async function edit(turn, text) {
  const user = answers.newTurn(turn.conversation, null, "user", { content: text, ...(turn.files ? { files: turn.files } : {}) });
  await add(conversations.get(turn.conversation), turn.parent, user);
}

async function stop() {
  if (!here) return;
  const turns = await turnsOf(here);
  path(turns, conversations.get(here)?.head).filter(answers.isRunning).forEach(answers.stop);
}

// ── files

function drawAttached() {
  $("attached").replaceChildren(...attached.map((file) => fileView(file, () => {
    attached = attached.filter((other) => other !== file);
    drawAttached();
    $("input").focus();
  })));
}

async function attach(files) {
  for (const file of files) {
    try { attached.push(await textFile(file)); } catch (error) { say(error.message, true); }
  }
  drawAttached();
  $("input").focus();
}

const fileName = (name) => name.replace(/[^\p{L}\p{N} ._-]+/gu, "").trim().slice(0, 60) || "conversation";
const entry = async (one) => ({ conversation: one, turns: [...(await turnsOf(one.id)).values()].map(({ owner, ...turn }) => turn) });

async function exportAs(form) {
  const one = conversations.get(here);
  $("more").open = false;
  if (!one) return say("There is no conversation to export.", true);
  if (form === "json") download(`${fileName(one.name)}.json`, toJSON([await entry(one)]), "application/json");
  else download(`${fileName(one.name)}.md`, toMarkdown(one, await turnsOf(one.id)), "text/markdown");
}

async function importFiles(files) {
  let count = 0;
  for (const file of files) {
    try {
      const there = new Map((await allTurns()).map((turn) => [turn.id, turn.conversation]));
      for (const { conversation, turns } of read(file.name, await file.text())) {
        const known = conversations.get(conversation.id);
        await turnsOf(conversation.id);
        const taken = turns.some((turn) => there.has(turn.id) && there.get(turn.id) !== conversation.id);
        if (taken) throw new Error(`${file.name}: a turn in it has the id of one in another conversation.`);
        await putAll(known || conversation, turns.filter((turn) => !there.has(turn.id)));
        count++;
      }
    } catch (error) { say(error.message, true); }
  }
  if (count) say(`${count} imported.`);
  drawList();
  drawLog();
}

// ── the rest of the page

function grow() {
  const field = $("input");
  field.style.height = "auto";
  field.style.height = field.scrollHeight + 2 + "px";
}

function openSide() {
  $("side").classList.add("shown");
  $("shade").hidden = false;
  $("open-side").setAttribute("aria-expanded", "true");
  $("close-side").focus();
}

function closeSide() {
  if (!$("side").classList.contains("shown")) return;
  $("side").classList.remove("shown");
  $("shade").hidden = true;
  $("open-side").setAttribute("aria-expanded", "false");
  $("open-side").focus();
}

let searching = 0;
$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$("input").addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); attach(event.clipboardData.files); }
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); attach(event.dataTransfer.files); });
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("pull").open) return;
  const menu = document.querySelector(".menu[open]");
  if (menu) { menu.open = false; menu.firstElementChild.focus(); }
  else if ($("side").classList.contains("shown")) closeSide();
  else stop();
});
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll(".menu[open]")) if (!menu.contains(event.target)) menu.open = false;
});
$("log").addEventListener("scroll", () => {
  const log = $("log");
  following = log.scrollHeight - log.scrollTop - log.clientHeight < FOLLOW_PIXELS;
}, { passive: true });
$("search").addEventListener("input", () => {
  clearTimeout(searching);
  searching = setTimeout(async () => { await search($("search").value); drawList(); }, 120);
});
$("stop").onclick = stop;
$("new").onclick = () => { go(null); closeSide(); $("input").focus(); };
$("open-side").onclick = openSide;
$("close-side").onclick = $("shade").onclick = closeSide;
$("attach").onclick = () => $("files").click();
$("files").onchange = async () => { await attach($("files").files); $("files").value = ""; };
$("import").onclick = () => $("import-files").click();
$("import-files").onchange = async () => { await importFiles($("import-files").files); $("import-files").value = ""; };
$("export-all").onclick = async () => download("tiercel.json", toJSON(await Promise.all(sorted().map(entry))), "application/json");
$("export-json").onclick = () => exportAs("json");
$("export-markdown").onclick = () => exportAs("markdown");
$("notice-close").onclick = () => { $("notice").hidden = true; $("input").focus(); };
$("model").onchange = () => { settingsChanged(); showModel().then(drawLog); };
for (const id of [...SETTINGS, "think"]) $(id).addEventListener("change", settingsChanged);
setUpPull(async (name) => { await loadModels(name.includes(":") || name.includes("/") ? name : `${name}:latest`); settingsChanged(); });

writeSettings(defaults);
drawLog();
await open((text) => say(text, true));
const last = sessionStorage.getItem(HERE_KEY) ?? localStorage.getItem(HERE_KEY);
if (conversations.has(last)) go(last);
drawList();
await Promise.all([
  loadModels(conversations.get(here)?.model || defaults.model).then(drawLog),
  answers.resume(thinks, async (turn, before) => {
    const conversation = conversations.get(turn.conversation);
    if (turn.id !== before.id && conversation.head === before.id) await putAll({ ...conversation, head: turn.id }, [turn]);
  }).then(drawLog),
]);

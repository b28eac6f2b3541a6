// The chat page: one file, no library.  A conversation is {id, name, model, turns: [{role, content, thinking, figures}]}.
"use strict";

const $ = (id) => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};

// ── what is kept

const KEY = "tiercel.conversations";
const kept = (() => {
  try { return JSON.parse(localStorage.getItem(KEY)) || {}; } catch { return {}; }
})();
let talks = Array.isArray(kept.talks) ? kept.talks : [];
let here = talks.find((talk) => talk.id === kept.here) || null;
let models = [];
let running = null; // {controller, turn}

function keep() {
  try {
    localStorage.setItem(KEY, JSON.stringify({ talks, here: here && here.id, model: $("model").value,
      system: $("system").value, temperature: $("temperature").value, num_predict: $("num_predict").value,
      think: $("think").checked }));
  } catch {
    say("The browser's storage is full: this conversation will not be kept. Delete old ones.");
  }
}

// ── models

async function loadModels() {
  try {
    const answer = await fetch("api/tags");
    if (!answer.ok) throw new Error((await answer.json()).error);
    models = (await answer.json()).models;
  } catch (error) {
    models = [];
    say("The models could not be listed: " + error.message);
  }
  const pick = $("model");
  pick.replaceChildren(...models.map((model) =>
    make("option", { value: model.name, textContent: model.name.replace(/:latest$/, "") + "  ·  " + model.details.parameter_size })));
  if (!models.length) pick.append(make("option", { value: "", textContent: "no model here: tiercel pull smollm2" }));
  const wanted = (here && here.model) || kept.model;
  if (models.some((model) => model.name === wanted)) pick.value = wanted;
  await showCapabilities();
}

async function showCapabilities() {
  const name = $("model").value;
  $("think-box").hidden = true;
  if (!name) return;
  try {
    const answer = await fetch("api/show", { method: "POST", body: JSON.stringify({ model: name }) });
    const about = await answer.json();
    $("think-box").hidden = !(about.capabilities || []).includes("thinking");
  } catch { /* the list is enough to chat */ }
}

// ── drawing

function say(words) { $("status").textContent = words; }

function drawTalks(renaming) {
  $("talks").replaceChildren(...talks.map((talk) => {
    const row = make("li", { className: talk === here ? "here" : "" });
    if (talk.id === renaming) {
      const field = make("input", { value: talk.name, ariaLabel: "Name of the conversation", maxLength: 80 });
      let done = false;
      const end = (save) => {
        if (done) return;
        done = true;
        if (save && field.value.trim()) talk.name = field.value.trim();
        keep(); drawTalks();
        document.querySelector(`[data-id="${talk.id}"]`)?.focus();
      };
      field.addEventListener("keydown", (event) => {
        if (event.key === "Enter") end(true);
        if (event.key === "Escape") { event.stopPropagation(); end(false); }
      });
      field.addEventListener("blur", () => end(true));
      row.append(field);
      queueMicrotask(() => { field.focus(); field.select(); });
      return row;
    }
    const open = make("button", { className: "name", textContent: talk.name, type: "button" });
    open.dataset.id = talk.id;
    if (talk === here) open.setAttribute("aria-current", "true");
    open.onclick = () => { go(talk); closeSide(); };
    const rename = make("button", { className: "icon", textContent: "✎", ariaLabel: `Rename ${talk.name}`, type: "button" });
    rename.onclick = () => drawTalks(talk.id);
    const remove = make("button", { className: "icon", textContent: "✕", ariaLabel: `Delete ${talk.name}`, type: "button" });
    remove.onclick = () => {
      if (!confirm(`Delete “${talk.name}”?`)) return;
      if (talk === here) { stop(); here = null; }
      talks = talks.filter((other) => other !== talk);
      keep(); drawTalks(); drawLog(); $("new").focus();
    };
    row.append(open, rename, remove);
    return row;
  }));
}

function drawLog() {
  const log = $("log");
  if (!here || !here.turns.length) {
    log.replaceChildren(make("p", { className: "empty", textContent: "Nothing has been said yet." }));
    return;
  }
  log.replaceChildren(...here.turns.map((turn, index) => drawTurn(turn, index)));
  log.scrollTop = log.scrollHeight;
}

function drawTurn(turn, index) {
  if (turn.role === "user") return make("div", { className: "turn user", textContent: turn.content });
  const node = make("div", { className: "turn assistant" });
  fill(node, turn, index === here.turns.length - 1);
  return node;
}

// Code in fences and backticks is set as code; everything else is text as it came. Nothing is ever parsed as HTML.
function written(text) {
  const nodes = [];
  text.split("```").forEach((part, index) => {
    if (index % 2) {
      const line = part.indexOf("\n");
      nodes.push(make("pre", { tabIndex: 0 }, make("code", { textContent: part.slice(line + 1).replace(/\n$/, "") })));
    } else {
      part.split(/(`[^`\n]+`)/).forEach((piece) => {
        const code = piece.length > 2 && piece[0] === "`" && piece.endsWith("`");
        nodes.push(code ? make("code", { textContent: piece.slice(1, -1) }) : piece);
      });
    }
  });
  return nodes;
}

function fill(node, turn, last) {
  const busy = running && running.turn === turn;
  let reasoning = node.querySelector("details");
  if (turn.thinking) {
    if (!reasoning) {
      reasoning = make("details", { className: "reasoning" }, make("summary"), make("div"));
      node.prepend(reasoning);
    }
    reasoning.firstChild.textContent = busy && !turn.content ? "Thinking…" : "Reasoning";
    reasoning.lastChild.textContent = turn.thinking;
  }
  let text = node.querySelector(".text");
  if (!text) { text = make("div", { className: "text" }); node.append(text); }
  text.replaceChildren(...written(turn.content));
  text.classList.toggle("wait", Boolean(busy && !turn.content));
  node.querySelector(".figures")?.remove();
  node.querySelector(".error")?.remove();
  if (turn.error) node.append(make("p", { className: "error", textContent: turn.error }));
  if (busy) return;
  const row = make("div", { className: "figures" });
  const f = turn.figures;
  if (f) {
    if (f.rate) row.append(make("span", { textContent: `${f.rate.toFixed(1)} tok/s`, title: `${f.tokens} tokens in ${f.seconds.toFixed(1)} s` }));
    row.append(make("span", { textContent: `${f.cached} of ${f.prompt} prompt tokens reused`, title: "What the model did not have to read again" }));
  }
  if (turn.stopped) row.append(make("span", { textContent: "stopped" }));
  if (turn.short) row.append(make("span", { textContent: "cut off by the limit" }));
  if (last) {
    const again = make("button", { textContent: "Regenerate", type: "button" });
    again.onclick = regenerate;
    row.append(again);
  }
  node.append(row);
}

// ── talking

function go(talk) {
  if (talk === here) return;
  stop();
  here = talk;
  if (talk && models.some((model) => model.name === talk.model)) { $("model").value = talk.model; showCapabilities(); }
  keep(); drawTalks(); drawLog();
}

function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  if (!$("model").value) { say("There is no model to ask. In a terminal: tiercel pull smollm2"); return; }
  if (!here) {
    const name = text.split("\n")[0].slice(0, 48);
    here = { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), name, model: $("model").value, turns: [] };
    talks.unshift(here);
  }
  here.turns.push({ role: "user", content: text });
  $("input").value = ""; grow();
  answer();
}

function regenerate() {
  if (running || !here) return;
  while (here.turns.length && here.turns[here.turns.length - 1].role === "assistant") here.turns.pop();
  if (here.turns.length) answer();
}

async function answer() {
  const talk = here, turn = { role: "assistant", content: "", thinking: "" };
  talk.model = $("model").value;
  const messages = talk.turns.filter((t) => !t.error || t.content)
    .map((t) => ({ role: t.role, content: t.content, ...(t.thinking ? { thinking: t.thinking } : {}) }));
  if ($("system").value.trim()) messages.unshift({ role: "system", content: $("system").value.trim() });
  const options = {};
  if ($("temperature").value !== "") options.temperature = Number($("temperature").value);
  if ($("num_predict").value !== "") options.num_predict = Number($("num_predict").value);
  const body = { model: talk.model, messages, options, stream: true };
  if (!$("think-box").hidden) body.think = $("think").checked;
  const controller = new AbortController();
  talk.turns.push(turn);
  running = { controller, turn };
  busy(true); drawTalks(); drawLog();
  const node = $("log").lastChild;
  try {
    const reply = await fetch("api/chat", { method: "POST", body: JSON.stringify(body), signal: controller.signal });
    if (!reply.ok) throw new Error((await reply.json()).error || reply.statusText);
    for await (const line of lines(reply.body)) {
      if (line.error) throw new Error(line.error);
      turn.content += line.message.content;
      turn.thinking += line.message.thinking || "";
      if (line.done) {
        const seconds = line.eval_duration / 1e9;
        turn.figures = { tokens: line.eval_count, seconds, rate: seconds > 0 ? line.eval_count / seconds : 0,
          prompt: line.prompt_eval_count, cached: line.cached_tokens || 0 };
        turn.short = line.done_reason === "length";
      }
      draw(talk, node, turn);
    }
  } catch (error) {
    if (error.name === "AbortError") turn.stopped = true;
    else turn.error = error.message === "Failed to fetch" ? "The server does not answer." : error.message;
  }
  if (running && running.turn === turn) { running = null; busy(false); }
  keep();
  if (talk === here) { fill(node, turn, true); follow(node); }
  say(turn.error ? "The answer failed: " + turn.error : turn.stopped ? "Stopped." : "The answer is complete.");
}

let frame = 0;
function draw(talk, node, turn) {
  if (frame) return;
  frame = requestAnimationFrame(() => { frame = 0; if (talk === here && running && running.turn === turn) { fill(node, turn, true); follow(node); } });
}

function follow() {
  const log = $("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 160) log.scrollTop = log.scrollHeight;
}

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
}

function stop() { if (running) running.controller.abort(); }

function busy(on) {
  $("send").hidden = on; $("stop").hidden = !on;
  $("log").setAttribute("aria-busy", String(on));
  if (on) say("The model is answering."); else if (document.activeElement === $("stop") || document.activeElement === document.body) $("input").focus();
}

// ── the rest of the page

function grow() {
  const field = $("input");
  field.style.height = "auto";
  field.style.height = field.scrollHeight + 2 + "px";
}

function openSide() {
  $("side").classList.add("shown"); $("shade").hidden = false;
  $("open-side").setAttribute("aria-expanded", "true"); $("close-side").focus();
}
function closeSide() {
  if (!$("side").classList.contains("shown")) return;
  $("side").classList.remove("shown"); $("shade").hidden = true;
  $("open-side").setAttribute("aria-expanded", "false"); $("open-side").focus();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if ($("settings").open) { $("settings").open = false; $("settings").firstElementChild.focus(); }
  else if ($("side").classList.contains("shown")) closeSide();
  else stop();
});
document.addEventListener("click", (event) => { if (!$("settings").contains(event.target)) $("settings").open = false; });
$("stop").onclick = stop;
$("new").onclick = () => { stop(); here = null; keep(); drawTalks(); drawLog(); closeSide(); $("input").focus(); };
$("open-side").onclick = openSide;
$("close-side").onclick = closeSide;
$("shade").onclick = closeSide;
$("model").onchange = () => { keep(); showCapabilities(); };
for (const id of ["system", "temperature", "num_predict", "think"]) $(id).addEventListener("change", keep);
for (const id of ["system", "temperature", "num_predict"]) if (typeof kept[id] === "string") $(id).value = kept[id];
if (kept.think === false) $("think").checked = false;

drawTalks(); drawLog(); loadModels();

// The picker, what is in memory, and new models.

import * as api from "./api.js";
import { $, bytes, make, say } from "./dom.js";

const KEY = "tiercel.models"; // the list of last time is shown until the new one is there
export let models = [];
let resident = [], about = {}, aboutName = "", pulling = null;
const thinking = new Map(); // model → whether it can think

const parsed = (text) => { try { return JSON.parse(text); } catch { return null; } };
const short = (found) => found.map((model) => ({ name: model.name, size: model.details.parameter_size }));

function drawPicker(wanted) {
  const pick = $("model"), before = wanted || pick.value;
  const labels = models.map((model) => `${model.name.replace(/:latest$/, "")}  ·  ${model.size}`);
  if (labels.join("\n") !== [...pick.options].map((o) => o.textContent).join("\n") || !models.length) {
    pick.replaceChildren(...models.map((model, index) => make("option", { value: model.name, textContent: labels[index] })));
    if (!models.length) pick.append(make("option", { value: "", textContent: "no model here: get one" }));
  }
  if (models.some((model) => model.name === before)) pick.value = before;
}

// This module runs before the others are loaded: the picker is there first.
models = parsed(localStorage.getItem(KEY)) || [];
const last = parsed(localStorage.getItem("tiercel.settings"))?.model;
if (models.length) drawPicker(last);
let listing = api.tags();
listing.then((found) => { models = short(found); drawPicker(last); }, () => {});

export async function loadModels(wanted) {
  try {
    models = short(await (listing || api.tags()));
    listing = null;
    localStorage.setItem(KEY, JSON.stringify(models));
  } catch (error) {
    say("The models could not be listed: " + error.message, true);
  }
  drawPicker(wanted);
  await Promise.all([showModel(), showMemory()]);
}

// Whether a model can think; asked for once.
export async function thinks(model) {
  if (!thinking.has(model)) {
    try {
      const found = await api.show(model);
      thinking.set(model, (found.capabilities || []).includes("thinking"));
      if (model === $("model").value) { about = found.model_info || {}; aboutName = model; }
    } catch { return false; /* the list is enough to chat */ }
  }
  return thinking.get(model);
}

export async function showModel() {
  const model = $("model").value;
  if (!model) return;
  const can = await thinks(model);
  if (model === $("model").value) for (const id of ["think-box", "budget-box"]) $(id).hidden = !can;
}

export async function showMemory() {
  try { resident = await api.ps(); } catch { resident = []; }
  const all = resident.map((one) => `${one.name.replace(/:latest$/, "")}: ${bytes(one.size)}`);
  $("memory").textContent = all.length ? `In memory: ${all.join(", ")}` : "No model in memory yet";
}

// used: tokens of the conversation that is shown; null where no answer said it yet.
export function showContext(used) {
  const model = $("model").value;
  const size = resident.find((one) => one.name === model)?.context_length
    || (aboutName === model ? about[`${about["general.architecture"]}.context_length`] : 0);
  $("context").hidden = !size || used === null;
  if (!size || used === null) return;
  $("context-meter").max = size;
  $("context-meter").value = Math.min(used, size);
  $("context-text").textContent = `${used.toLocaleString("en")} of ${size.toLocaleString("en")} tokens, ${Math.max(size - used, 0).toLocaleString("en")} left`;
}

// ── getting a model

export function setUpPull(got) {
  const dialog = $("pull"), bar = $("pull-bar"), text = $("pull-text");
  $("open-pull").onclick = () => dialog.showModal();
  $("pull-close").onclick = () => dialog.close();
  $("pull-stop").onclick = () => pulling?.abort();
  $("pull-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const name = $("pull-name").value.trim();
    if (!name || pulling) return;
    pulling = new AbortController();
    bar.hidden = $("pull-stop").hidden = false;
    bar.removeAttribute("value");
    text.textContent = "Beginning…";
    try {
      for await (const line of api.stream("api/pull", { model: name }, pulling.signal)) {
        if (line.total) { bar.max = line.total; bar.value = line.completed || 0; }
        text.textContent = line.total ? `${line.status}: ${bytes(line.completed || 0)} of ${bytes(line.total)}` : line.status;
      }
      text.textContent = `${name} is here.`;
      say(text.textContent);
      await got(name);
    } catch (error) {
      text.textContent = error.name === "AbortError" ? "Stopped; what was loaded is kept for the next try." : `It failed: ${error.message}`;
    } finally {
      pulling = null;
      bar.hidden = $("pull-stop").hidden = true;
    }
  });
}

// The picker, what is in memory, and new models.

import * as api from "./api.js";
import { $, bytes, say } from "./dom.js";

const KEY = "tiercel.models"; // the list of last time is shown until the new one is there
const { draw, short, kept } = window.tiercelPicker;
let { listing } = window.tiercelPicker;
export let models = kept;
let resident = [], about = {}, aboutName = "", pulling = null;
const thinking = new Map(); // model → whether it can think

export async function loadModels(wanted) {
  try {
    const first = listing;
    listing = null;
    models = first ? await first : short(await api.tags());
    localStorage.setItem(KEY, JSON.stringify(models));
  } catch (error) {
    say("The models could not be listed: " + error.message, true);
  }
  draw(models, wanted);
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

// Runs while the page is parsed: the models of the last visit are in the picker at its first paint, and today's are asked for.
// The modules come later (models.js takes `tiercelPicker`).
"use strict";
window.tiercelPicker = (() => {
  const parsed = (key) => { try { return JSON.parse(localStorage.getItem(key)); } catch { return null; } };
  const pick = document.getElementById("model");
  const label = (model) => `${model.name.replace(/:latest$/, "")}  ·  ${model.size}`;
  const draw = (models, wanted = pick.value) => {
    const options = models.map((model) => new Option(label(model), model.name));
    if (!options.length) options.push(new Option("no model here: get one", ""));
    if (options.map((o) => o.text).join("\n") !== [...pick.options].map((o) => o.text).join("\n")) pick.replaceChildren(...options);
    if (models.some((model) => model.name === wanted)) pick.value = wanted;
  };
  const kept = parsed("tiercel.models") || [], wanted = parsed("tiercel.settings")?.model;
  if (kept.length) draw(kept, wanted);
  const short = (found) => found.map((model) => ({ name: model.name, size: model.details.parameter_size }));
  const listing = fetch("api/tags").then(async (reply) => {
    const body = await reply.json();
    if (!reply.ok) throw new Error(body.error);
    const models = short(body.models);
    draw(models, kept.length ? pick.value : wanted);
    return models;
  });
  listing.catch(() => {}); // whoever awaits it says so
  return { draw, short, kept, listing };
})();

// One turn on the page: its text, its figures, and what can be done with it.

import { bytes, button, copyButton, make } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const ENDS = { cut: "cut off by the limit", stopped: "stopped", interrupted: "interrupted" };

export class TurnView {
  // actions: {edit, regenerate, continue, branch}, each called with the turn.
  constructor(turn, actions) {
    this.actions = actions;
    this.node = make("div", { className: "message" });
    this.box = make("div", { className: `turn ${turn.role}` });
    this.node.append(this.box);
    this.foot = make("div", { className: turn.role === "user" ? "actions mine" : "figures" });
    if (turn.role === "user") {
      this.box.textContent = turn.content;
      for (const file of turn.files || []) this.node.prepend(fileView(file));
      this.node.append(this.foot);
      return;
    }
    this.thoughts = make("div");
    this.reasoning = make("details", { className: "reasoning", hidden: true }, make("summary"), this.thoughts);
    this.text = make("div", { className: "text" });
    this.error = make("p", { className: "error", hidden: true });
    this.box.append(this.text, this.error);
    this.markdown = new MarkdownView(this.text);
  }

  // busy: it is being written.  siblings, place: the other turns after the same parent.  last: nothing follows.
  // Returns whether a part is still to be drawn, in a later frame.
  update(turn, { busy, siblings, place, last, blocked }) {
    if (turn.role === "user") return this.updateFoot(turn, [
      ...this.branch(turn, siblings, place),
      blocked ? null : button("Edit", () => this.edit(turn)),
      copyButton(() => turn.content, "Copy this message"),
    ], `${siblings} ${place} ${blocked}`);
    this.showThoughts(turn.thinking, busy && !turn.content);
    const more = this.markdown.update(turn.content, !busy);
    this.text.classList.toggle("wait", Boolean(busy && !turn.content));
    this.error.hidden = !turn.error;
    this.error.textContent = turn.error || "";
    if (busy) { this.foot.remove(); this.key = ""; return more; }
    const unfinished = turn.state !== "done" && turn.content;
    this.updateFoot(turn, [
      ...figures(turn), ENDS[turn.state] ? make("span", { textContent: ENDS[turn.state] }) : null,
      ...this.branch(turn, siblings, place),
      last && unfinished && !blocked ? button("Continue", () => this.actions.continue(turn)) : null,
      blocked ? null : button("Regenerate", () => this.actions.regenerate(turn)),
      copyButton(() => turn.content, "Copy this answer as Markdown"),
    ], `${turn.state} ${siblings} ${place} ${last} ${blocked} ${JSON.stringify(turn.figures)}`);
    if (!this.foot.isConnected) this.box.append(this.foot);
    return false;
  }

  updateFoot(turn, parts, key) {
    if (this.key === key) return;
    this.key = key;
    this.foot.replaceChildren(...parts.filter(Boolean));
  }

  showThoughts(text, now) {
    this.reasoning.hidden = !text;
    if (text && !this.reasoning.isConnected) this.box.prepend(this.reasoning);
    if (!text) return this.reasoning.remove();
    const title = now ? "Thinking…" : "Reasoning", summary = this.reasoning.firstChild;
    if (summary.textContent !== title) summary.textContent = title;
    const before = this.thoughts.textContent;
    if (text.startsWith(before)) this.thoughts.append(text.slice(before.length));
    else this.thoughts.textContent = text;
  }

  branch(turn, siblings, place) {
    if (siblings < 2) return [];
    const go = (to, text, label) => button(text, () => this.actions.branch(turn, to), { ariaLabel: label, disabled: to < 0 || to >= siblings });
    return [make("span", { className: "branch", role: "group", ariaLabel: "Versions" }, go(place - 1, "‹", "Previous version"),
      make("span", { textContent: `${place + 1} / ${siblings}` }), go(place + 1, "›", "Next version"))];
  }

  edit(turn) {
    const field = make("textarea", { value: turn.content, rows: Math.min(12, turn.content.split("\n").length + 1), ariaLabel: "Edit the message" });
    const end = () => { form.replaceWith(this.box); this.foot.hidden = false; this.foot.querySelector("button")?.focus(); };
    const form = make("form", { className: "edit" }, field, make("div", { className: "row" },
      make("button", { type: "submit", className: "main", textContent: "Ask this instead" }), button("Cancel", end)));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) this.actions.edit(turn, field.value.trim());
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); end(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
    });
    this.box.replaceWith(form);
    this.foot.hidden = true;
    field.focus();
  }
}

function figures({ figures: f }) {
  if (!f) return [];
  return [
    f.rate ? make("span", { textContent: `${f.rate.toFixed(1)} tok/s`, title: `${f.tokens} tokens in ${f.seconds.toFixed(1)} s` }) : null,
    make("span", { textContent: `${f.cached} of ${f.prompt} prompt tokens reused`, title: "What the model did not have to read again" }),
  ];
}

export function fileView(file, remove) {
  const view = make("details", { className: "file" }, make("summary", { textContent: `${file.name} · ${bytes(new Blob([file.text]).size)}` }),
    make("pre", { tabIndex: 0, textContent: file.text }));
  return remove ? make("div", { className: "attached" }, view, button("✕", remove, { className: "icon", ariaLabel: `Leave out ${file.name}` })) : view;
}

// Small helpers around the document.

export const $ = (id) => document.getElementById(id);

// An element with properties and children; text stays text.
export function make(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children.filter((child) => child != null));
  return node;
}

export const button = (text, onclick, props = {}) => make("button", { type: "button", textContent: text, onclick, ...props });

// A short message for screen readers, and a line above the form when `visible`.
export function say(text, visible = false) {
  $("status").textContent = text;
  if (!visible) return;
  $("notice-text").textContent = text;
  $("notice").hidden = false;
}

export const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");

export function bytes(count) {
  for (const unit of ["B", "KB", "MB"]) {
    if (count < 1000) return `${count < 10 && unit !== "B" ? count.toFixed(1) : Math.round(count)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} GB`;
}

export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = make("textarea", { value: text, className: "hidden" }); // no clipboard API outside secure contexts
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

// A button that copies what `text()` returns and says so.
export function copyButton(text, label) {
  const node = button("Copy", async () => {
    try {
      await copyText(text());
      node.textContent = "Copied";
      say("Copied.");
    } catch {
      node.textContent = "Not copied";
      say("The browser did not allow copying.");
    }
    setTimeout(() => { node.textContent = "Copy"; }, 1500);
  }, { ariaLabel: label });
  return node;
}

export function download(name, text, type) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Markdown that grows: blocks that are complete are rendered once, only the last one again as it changes.
//
// An answer's HTML is shown as text (but for line breaks, sub- and superscripts), images as links: nothing is fetched.
// DOMPurify is a second wall behind that. Mathematics and colours come from libraries loaded at first use.

import { copyButton, make, say } from "./dom.js";
import { DOMPurify, Marked } from "./marked.js";

const GROWING_ROWS = 2; // at the end of a list or table, which what follows may change
const COSTLY_MILLISECONDS = 3; // a rendering that takes longer is followed by a rest of REST_FACTOR times as long
const REST_FACTOR = 6;
const PLAIN_CHARACTERS = 12000; // of an unfinished block, beyond which it is shown as text until it is complete
const COLOUR_MILLISECONDS = 250; // between two colourings of code that still grows
const COLOUR_CHARACTERS = 8000;
const MAX_FORMULAS = 500; // kept as rendered
const ALLOWED = {
  ALLOWED_TAGS: ["a", "blockquote", "br", "code", "del", "em", "h2", "h3", "h4", "h5", "h6", "hr", "input", "kbd", "li", "ol",
    "p", "pre", "span", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul"],
  ALLOWED_ATTR: ["href", "class", "start", "align", "type", "checked", "disabled", "data-display"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "checked", "disabled", "start", "type"], // their values are no addresses
  RETURN_DOM_FRAGMENT: true,
};
const SAFE_TAG = /^<\/?(?:br|sub|sup|kbd) ?\/?>$/i;
const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const formula = (text, display) => `<span class="math" data-display="${display}">${escaped(text)}</span>`;

// $x$ as pandoc reads it (no space inside, no digit behind: $5 and $10 are prices), \(x\), $$x$$ and \[x\].
const INLINE = /^(?:\$\$((?:\\.|[^\\$])+?)\$\$|\$(?![\s$])((?:\\.|[^\\$\n])*?[^\s\\$]|\\.)\$(?!\d)|\\\(([\s\S]+?)\\\)|\\\[([\s\S]+?)\\\])/;
const BLOCK = /^ {0,3}(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\]) *(?:\n|$)/;
const marked = new Marked({ gfm: true, breaks: false });
marked.use({
  extensions: [
    { name: "formula", level: "inline", start: (text) => text.match(/\$|\\[([]/)?.index,
      tokenizer(text) {
        const found = INLINE.exec(text);
        if (found) return { type: "formula", raw: found[0], text: found.slice(1).find(Boolean), display: Boolean(found[1] || found[4]) };
      },
      renderer: (token) => formula(token.text, token.display) },
    { name: "formulas", level: "block", start: (text) => text.match(/(?:^|\n) {0,3}(?:\$\$|\\\[)/)?.index,
      tokenizer(text) {
        const found = BLOCK.exec(text);
        if (found) return { type: "formulas", raw: found[0], text: found[1] || found[2] };
      },
      renderer: (token) => `<p>${formula(token.text, true)}</p>` },
  ],
  renderer: {
    html({ text, block }) {
      const shown = SAFE_TAG.test(text.trim()) ? text : escaped(text);
      return block ? `<p>${shown}</p>` : shown;
    },
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    heading({ tokens, depth }) { // the page has the first level
      const level = Math.min(depth + 1, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

// ── libraries that are loaded when they are needed

let katex = null, hljs = null;
const wanted = {};
const load = (name, use) => (wanted[name] ||= import(`./${name}.js`).then(use, () => say(`${name} could not be loaded.`)));
const formulas = new Map(); // display and text → a rendered node

function setFormula(node) {
  if (!katex) {
    if (!document.querySelector("link[href$='katex.css']")) {
      document.head.append(make("link", { rel: "stylesheet", href: "page/katex.css" }));
    }
    load("katex", (module) => {
      katex = module.katex;
      document.querySelectorAll(".math:not([data-set])").forEach(setFormula);
    });
    return;
  }
  const text = node.textContent, display = node.dataset.display === "true", key = `${display} ${text}`;
  let set = formulas.get(key);
  if (!set) {
    set = make("span");
    katex.render(text, set, { displayMode: display, throwOnError: false, trust: false, maxExpand: 200, maxSize: 20, strict: "ignore" });
    if (formulas.size >= MAX_FORMULAS) formulas.delete(formulas.keys().next().value);
    formulas.set(key, set);
  }
  node.dataset.set = "";
  node.replaceChildren(...set.cloneNode(true).childNodes);
  if (display) node.tabIndex = 0; // it may have to be scrolled
}

function colour(code, language) {
  if (!hljs) {
    load("highlight", (module) => {
      hljs = module.hljs;
      document.querySelectorAll("code[data-language]").forEach((node) => colour(node, node.dataset.language));
    });
    return;
  }
  if (!hljs.getLanguage(language)) return;
  const { value } = hljs.highlight(code.textContent, { language, ignoreIllegals: true }); // hljs escapes the code
  code.replaceChildren(DOMPurify.sanitize(value, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }));
}

// ── blocks

class CodeBlock {
  constructor(language) {
    this.language = (language || "").trim().split(/\s/)[0].toLowerCase();
    this.code = make("code", {}, "");
    if (this.language) this.code.dataset.language = this.language;
    this.node = make("div", { className: "code" },
      make("div", { className: "code-head" }, make("span", { textContent: this.language || "text" }),
        copyButton(() => this.code.textContent, `Copy this ${this.language || "text"}`)),
      make("pre", { tabIndex: 0, ariaLabel: "Code", role: "region" }, this.code));
    this.text = "";
    this.coloured = 0;
  }

  update(text, complete) {
    const added = text.startsWith(this.text) ? text.slice(this.text.length) : null;
    if (added === null) this.code.textContent = text;
    else if (added) this.code.append(added);
    this.text = text;
    if (!this.language) return;
    const now = performance.now();
    if (complete || (text.length < COLOUR_CHARACTERS && now - this.coloured > COLOUR_MILLISECONDS)) {
      this.coloured = now;
      colour(this.code, this.language);
    }
  }
}

function fragment(tokens) {
  const found = DOMPurify.sanitize(marked.parser(tokens), ALLOWED);
  for (const code of found.querySelectorAll("pre > code")) {
    const block = new CodeBlock(code.className.replace("language-", ""));
    block.update(code.textContent.replace(/\n$/, ""), true);
    code.parentNode.replaceWith(block.node);
  }
  for (const link of found.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const table of found.querySelectorAll("table")) {
    const wide = make("div", { className: "table", tabIndex: 0, role: "region", ariaLabel: "Table" });
    table.replaceWith(wide);
    wide.append(table);
  }
  for (const box of found.querySelectorAll("input")) Object.assign(box, { type: "checkbox", disabled: true, ariaLabel: "Item" });
  found.querySelectorAll(".math").forEach(setFormula);
  return found;
}

// A list or table whose rows are rendered once; only those after `settled` are looked at again.
class Rows {
  constructor(token) {
    this.kind = token.type;
    this.settled = 0;
    this.keys = []; // of the rows after the settled ones
    this.node = null;
    this.loose = token.loose;
    this.mixed = false; // whether an item's blank lines change how earlier ones are set
  }

  static rowsOf = (token) => (token.type === "list" ? token.items : token.rows);
  part = (token, rows) => (this.kind === "list" ? { ...token, items: rows } : { ...token, rows });

  update(token) {
    this.mixed ||= this.settled > 0 && token.loose !== this.loose;
    const head = this.kind === "list" ? token.loose : token.header.map((cell) => cell.text).join("\0");
    if (!this.node || (!this.settled && head !== this.head)) this.begin(token, head);
    Rows.rowsOf(token).forEach((row, index) => {
      const key = this.kind === "list" ? row.raw.trimEnd() : row.map((cell) => cell.text).join("\0");
      if (this.keys[index] === key) return;
      const made = fragment([this.part(token, [row])]).querySelector(this.kind === "list" ? "li" : "tbody tr");
      const before = this.body.children[this.settled + index];
      before ? before.replaceWith(made) : this.body.append(made);
      this.keys[index] = key;
    });
  }

  begin(token, head) {
    const made = fragment([this.part(token, [])]).firstElementChild;
    this.node?.replaceWith(made);
    this.node = made;
    this.body = this.kind === "list" ? made : made.querySelector("tbody") || made.querySelector("table").appendChild(make("tbody"));
    this.head = head;
    this.loose = token.loose;
    this.keys = [];
  }

  // The first `count` rows of the last token will not change.
  settle(count) {
    this.settled += count;
    this.keys.splice(0, count);
  }
}

// The element `node` as the place of a text that grows.
export class MarkdownView {
  constructor(node) {
    this.node = node;
    this.reset();
  }

  reset() {
    this.node.replaceChildren();
    this.text = "";
    this.complete = 0; // characters that are rendered for good
    this.head = ""; // a table's first two lines, which its later rows are read with
    this.tail = null; // {key, block} of the last block, or {key, nodes}
    this.defined = false; // whether the text names links at another place
    this.over = false;
    this.rested = 0; // when the next rendering may be, after a costly one
  }

  // text: the whole text so far.  over: nothing will follow.  Returns whether there is more to draw later.
  update(text, over) {
    if (text === this.text && over === this.over) return false;
    const began = performance.now();
    if (!over && began < this.rested) return true;
    if (!text.startsWith(this.text) || (this.over && text !== this.text)) this.reset(); // a cut answer goes on inside its last block
    this.text = text;
    this.over = over;
    const tokens = marked.lexer(this.head + text.slice(this.complete));
    this.defined ||= tokens.some((token) => token.type === "def");
    if (over && this.defined) this.whole(text);
    else this.drawAll(tokens, over);
    const cost = performance.now() - began;
    this.rested = cost > COSTLY_MILLISECONDS ? began + REST_FACTOR * cost : 0;
    return false;
  }

  drawAll(tokens, over) {
    let last = tokens.length - 1, length = 0;
    while (last >= 0 && (tokens[last].type === "space" || tokens[last].type === "def")) last--;
    tokens.slice(0, over ? tokens.length : Math.max(last, 0)).forEach((token) => {
      length += token.raw.length - this.head.length;
      this.draw(token, true);
      this.end();
    });
    if (!over && last >= 0) length += this.drawLast(tokens[last]);
    this.complete += length;
  }

  // Draws the block that may still grow; returns how many of its characters will not be looked at again.
  drawLast(token) {
    this.draw(token, false);
    const block = this.tail.block;
    if (!(block instanceof Rows)) return 0;
    const rows = Rows.rowsOf(token), count = rows.length - GROWING_ROWS;
    if (count < 1) return 0;
    block.settle(count);
    if (token.type === "list") return rows.slice(0, count).reduce((sum, row) => sum + row.raw.length, 0);
    const lines = token.raw.split("\n"), head = lines.slice(0, 2).join("\n") + "\n";
    const length = lines.slice(0, 2 + count).join("\n").length + 1 - this.head.length;
    this.head = head;
    return length;
  }

  // The tail's block is complete.
  end() {
    const block = this.tail?.block;
    this.head = "";
    if (block instanceof Rows && block.mixed) this.defined = true; // set as a whole when all is there
    this.tail = null;
  }

  whole(text) {
    this.head = "";
    this.node.replaceChildren(fragment(marked.lexer(text)));
    this.complete = text.length;
    this.tail = null;
  }

  draw(token, complete) {
    const kind = token.type === "list" || token.type === "table" ? "rows" : token.type === "code" ? "code" : "other";
    const key = `${kind} ${token.type} ${token.lang || ""} ${token.ordered || ""}`;
    if (kind === "other") return this.drawOther(token, complete, key);
    if (this.tail?.key !== key) {
      this.clearTail();
      this.tail = { key, block: kind === "code" ? new CodeBlock(token.lang) : new Rows(token) };
    }
    const { block } = this.tail;
    block.update(kind === "code" ? token.text : token, complete);
    if (block.node.parentNode !== this.node) this.node.append(block.node);
  }

  drawOther(token, complete, key) {
    const plain = !complete && token.raw.length > PLAIN_CHARACTERS;
    if (plain && this.tail?.plain !== undefined && token.raw.startsWith(this.tail.plain)) {
      this.tail.nodes[0].append(token.raw.slice(this.tail.plain.length));
      this.tail.plain = token.raw;
      return;
    }
    const nodes = plain ? [make("p", { textContent: token.raw })] : [...fragment([token]).childNodes];
    this.clearTail();
    this.node.append(...nodes);
    this.tail = { key, nodes, ...(plain ? { plain: token.raw } : {}) };
  }

  clearTail() {
    if (this.tail?.nodes) this.tail.nodes.forEach((node) => node.remove());
    else this.tail?.block.node?.remove();
    this.tail = null;
  }
}

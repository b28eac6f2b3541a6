// Turns as a tree, without the document.

export function children(turns, parent) {
  return [...turns.values()].filter((turn) => turn.parent === parent).sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

// From the first turn to `head`.
export function path(turns, head) {
  const found = [];
  for (let turn = turns.get(head); turn && found.length <= turns.size; turn = turns.get(turn.parent)) found.unshift(turn);
  return found;
}

// The newest turn below `id`.
export function newest(turns, id) {
  for (let seen = 0; seen <= turns.size; seen++) {
    const last = children(turns, id).at(-1);
    if (!last) return id;
    id = last.id;
  }
  return id;
}

// What a user's turn says to the model: its files in fences, then its text.
export function wholeText(turn) {
  const files = (turn.files || []).map(({ name, text }) => {
    const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map((run) => run[0].length));
    const fence = "`".repeat(longest + 1);
    return `${name}\n${fence}\n${text.replace(/\n$/, "")}\n${fence}\n`;
  });
  return [...files, turn.content].join("\n");
}

// The messages of a request whose answer follows `turns`.
export function messagesOf(turns, system) {
  const found = turns.filter((turn) => turn.role === "user" || turn.content).map((turn) => ({
    role: turn.role, content: turn.role === "user" ? wholeText(turn) : turn.content,
    ...(turn.thinking ? { thinking: turn.thinking } : {}),
  }));
  if (system?.trim()) found.unshift({ role: "system", content: system.trim() });
  return found;
}

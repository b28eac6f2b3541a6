// Markdown → tokens and HTML (marked), HTML → safe nodes (DOMPurify).
export { Marked } from "marked";
export { default as DOMPurify } from "dompurify";

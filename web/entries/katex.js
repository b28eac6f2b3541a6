// LaTeX → nodes; loaded when an answer has mathematics.
export { default as katex } from "katex";

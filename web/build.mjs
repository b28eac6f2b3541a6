// Bundles the page's libraries from package-lock.json into ../src/tiercel/serve/page/vendor (make page).
// manifest.json there holds the hash of every input and output: tests/serve/test_page_bundle.py compares them without npm.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";

const LIBRARIES = ["dompurify", "highlight.js", "katex", "marked"];
const INPUTS = ["build.mjs", "package.json", "package-lock.json", "entries/highlight.js", "entries/marked.js", "entries/katex.js"];
const out = new URL("../src/tiercel/serve/page/vendor/", import.meta.url);
const hash = (file) => createHash("sha256").update(readFileSync(file)).digest("hex");

rmSync(out, { recursive: true, force: true });
mkdirSync(out);
await build({ entryPoints: ["entries/marked.js", "entries/katex.js", "entries/highlight.js"], outdir: out.pathname, bundle: true,
  format: "esm", minify: true, target: "es2022", legalComments: "none", absWorkingDir: new URL(".", import.meta.url).pathname });

const css = readFileSync("node_modules/katex/dist/katex.min.css", "utf8")
  .replaceAll(/,url\([^)]*\.(woff|ttf)\) format\("[a-z]+"\)/g, "").replaceAll("url(fonts/", "url(");
writeFileSync(new URL("katex.css", out), css);
for (const font of readdirSync("node_modules/katex/dist/fonts").filter((name) => name.endsWith(".woff2"))) {
  copyFileSync(`node_modules/katex/dist/fonts/${font}`, new URL(font, out));
}

const licences = LIBRARIES.map((name) => {
  const about = JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8"));
  return `${name} ${about.version} (${about.license})\n\n${readFileSync(`node_modules/${name}/LICENSE`, "utf8").trim()}\n`;
});
writeFileSync(new URL("LICENSES.txt", out), licences.join("\n" + "=".repeat(80) + "\n\n"));
const manifest = { inputs: Object.fromEntries(INPUTS.map((name) => [name, hash(name)])),
  outputs: Object.fromEntries(readdirSync(out).sort().map((name) => [name, hash(new URL(name, out))])) };
writeFileSync(new URL("manifest.json", out), JSON.stringify(manifest, null, 1) + "\n");

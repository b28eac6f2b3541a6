// list, chat, streamed, format, embed
import { Ollama } from "ollama";
const { CLIENTS_URL: host, CLIENTS_MODEL: model } = process.env;
const client = new Ollama({ host });
const messages = [{ role: "user", content: "hi" }];
if (!(await client.list()).models.length) throw new Error("no models");
if (!(await client.chat({ model, messages })).done) throw new Error("no end");
let last;
for await (const part of await client.chat({ model, messages, stream: true })) last = part;
if (!last.done) throw new Error("no end of the stream");
const format = { type: "object", properties: { yes: { type: "boolean" } }, required: ["yes"] };
const found = JSON.parse((await client.chat({ model, messages, format })).message.content);
if (typeof found.yes !== "boolean") throw new Error("no form");
if (!(await client.embed({ model, input: "a" })).embeddings[0].length) throw new Error("no embedding");

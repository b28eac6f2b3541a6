// chat, streamed, tools, responses
import OpenAI from "openai";
const { CLIENTS_URL: url, CLIENTS_MODEL: model } = process.env;
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none" });
const messages = [{ role: "user", content: "hi" }];
if (!(await client.chat.completions.create({ model, messages })).choices[0].finish_reason) throw new Error("no end");
let chunks = 0;
for await (const _ of await client.chat.completions.create({ model, messages, stream: true })) chunks++;
if (!chunks) throw new Error("nothing streamed");
const tools = [{ type: "function", function: { name: "f", parameters: { type: "object", properties: { x: { type: "boolean" } } } } }];
const called = await client.chat.completions.create({ model, messages, tools, tool_choice: "required" });
if (called.choices[0].message.tool_calls[0].function.name !== "f") throw new Error("no call");
if (!(await client.responses.create({ model, input: "hi" })).id) throw new Error("no response");

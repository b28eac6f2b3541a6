// generateText, streamText, a typed output (@ai-sdk/openai-compatible)
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, streamText } from "ai";
const { CLIENTS_URL: url, CLIENTS_MODEL: name } = process.env;
const model = createOpenAICompatible({ name: "tiercel", baseURL: url + "/v1", supportsStructuredOutputs: true })(name);
if (!(await generateText({ model, prompt: "hi" })).finishReason) throw new Error("no end");
let parts = 0;
for await (const _ of streamText({ model, prompt: "hi" }).fullStream) parts++;
if (!parts) throw new Error("nothing streamed");
const schema = jsonSchema({ type: "object", properties: { yes: { type: "boolean" } }, required: ["yes"], additionalProperties: false });
const made = await generateText({ model, prompt: "Is it so?", output: Output.object({ schema }) });
if (typeof made.output.yes !== "boolean") throw new Error("no form");

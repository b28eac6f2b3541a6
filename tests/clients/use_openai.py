"""chat, streamed, tools, structured output, responses, embeddings, models"""

from common import MODEL, URL, Flag
from openai import OpenAI

client = OpenAI(base_url=URL + "/v1", api_key="none")
hi = [{"role": "user", "content": "hi"}]
assert MODEL in {model.id.removesuffix(":latest") for model in client.models.list()}
assert client.chat.completions.create(model=MODEL, messages=hi).choices[0].finish_reason in ("stop", "length")
assert [chunk for chunk in client.chat.completions.create(model=MODEL, messages=hi, stream=True)]
tool = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "boolean"}}}},
}
called = client.chat.completions.create(model=MODEL, messages=hi, tools=[tool], tool_choice="required")
assert called.choices[0].message.tool_calls[0].function.name == "f"
parsed = client.chat.completions.parse(model=MODEL, messages=hi, response_format=Flag).choices[0].message.parsed
assert isinstance(parsed, Flag)
first = client.responses.create(model=MODEL, input="hi")
assert client.responses.create(model=MODEL, input="more", previous_response_id=first.id).status in (
    "completed",
    "incomplete",
)
assert client.embeddings.create(model=MODEL, input=["a", "b"]).data[1].embedding

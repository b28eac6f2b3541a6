"""messages, streamed, tools, count_tokens"""

from anthropic import Anthropic
from common import MODEL, URL

client = Anthropic(base_url=URL, api_key="none")
hi = [{"role": "user", "content": "hi"}]
assert client.messages.create(model=MODEL, max_tokens=50, messages=hi).usage.output_tokens
with client.messages.stream(model=MODEL, max_tokens=50, messages=hi) as stream:
    assert stream.get_final_message().stop_reason in ("end_turn", "max_tokens")
tool = {"name": "f", "input_schema": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}}
called = client.messages.create(model=MODEL, max_tokens=200, messages=hi, tools=[tool], tool_choice={"type": "any"})
assert called.content[-1].type == "tool_use"
assert client.messages.count_tokens(model=MODEL, messages=hi).input_tokens > 1

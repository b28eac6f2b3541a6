"""completion by openai/, ollama_chat/ and anthropic/, streamed"""

import litellm
from common import MODEL, URL

hi = [{"role": "user", "content": "hi"}]
for name, base in (("openai", URL + "/v1"), ("ollama_chat", URL), ("anthropic", URL)):
    given = {"model": f"{name}/{MODEL}", "messages": hi, "api_base": base, "api_key": "none", "max_tokens": 20}
    assert litellm.completion(**given).choices[0].finish_reason in ("stop", "length")
    assert list(litellm.completion(**given, stream=True))

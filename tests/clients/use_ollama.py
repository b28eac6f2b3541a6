"""list, show, chat, streamed, tools, format, generate, embed, ps"""

from common import MODEL, URL, Flag
from ollama import Client

client = Client(host=URL)
hi = [{"role": "user", "content": "hi"}]
assert MODEL in {model.model.removesuffix(":latest") for model in client.list().models}
assert client.show(MODEL).modelinfo
assert client.chat(MODEL, hi).done and list(client.chat(MODEL, hi, stream=True))[-1].done


def f(x: bool) -> str:
    """Look it up.

    Args:
        x: whether
    """
    return str(x)


assert client.chat(MODEL, hi, tools=[f]).done
Flag.model_validate_json(client.chat(MODEL, hi, format=Flag.model_json_schema()).message.content)
assert client.generate(MODEL, "hi").done and client.embed(MODEL, ["a"]).embeddings and client.ps().models

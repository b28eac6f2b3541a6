"""complete, chat, stream (llama-index-llms-openai-like, llama-index-llms-ollama)"""

from common import MODEL, URL
from llama_index.core.llms import ChatMessage
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike

for llm in (
    OpenAILike(model=MODEL, api_base=URL + "/v1", api_key="none", is_chat_model=True),
    Ollama(model=MODEL, base_url=URL),
):
    assert llm.complete("hi").raw and llm.chat([ChatMessage(role="user", content="hi")]).raw
    assert list(llm.stream_chat([ChatMessage(role="user", content="hi")]))

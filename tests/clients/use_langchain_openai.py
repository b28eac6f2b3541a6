"""invoke, stream, with_structured_output, bind_tools, embeddings"""

from common import MODEL, URL, Flag
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

chat = ChatOpenAI(model=MODEL, base_url=URL + "/v1", api_key="none")
assert chat.invoke("hi").response_metadata and list(chat.stream("hi"))
assert isinstance(chat.with_structured_output(Flag).invoke("hi"), Flag)
assert chat.bind_tools([Flag], tool_choice="any").invoke("hi").tool_calls[0]["name"] == "Flag"
assert OpenAIEmbeddings(
    model=MODEL, base_url=URL + "/v1", api_key="none", check_embedding_ctx_length=False
).embed_query("a")

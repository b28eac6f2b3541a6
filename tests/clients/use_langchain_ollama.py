"""invoke, stream, with_structured_output, embeddings"""

from common import MODEL, URL, Flag
from langchain_ollama import ChatOllama, OllamaEmbeddings

chat = ChatOllama(model=MODEL, base_url=URL)
assert chat.invoke("hi").response_metadata and list(chat.stream("hi"))
assert isinstance(chat.with_structured_output(Flag).invoke("hi"), Flag)
assert OllamaEmbeddings(model=MODEL, base_url=URL).embed_query("a")

"""The engine over HTTP: Ollama's API, OpenAI's API, and a page to chat on.

app.py        routes, drain, the server's life        security.py   who may call
ollama.py     /api/…      library.py  its models      openai.py     /v1/…        responses.py  /v1/responses
talk.py       a question → its answer, no dialect     stream.py     bytes to a client
models.py     what is in memory, and for how long     settings.py   every limit
"""

"""The engine over HTTP: OpenAI's, Anthropic's and Ollama's APIs, and a chat page.

app.py         the application and its server    routes.py      the table of routes    security.py  who may call
openai/        /v1/…     anthropic/  /v1/messages     ollama/    /api/…     page/        the chat page
body.py        a request's body, checked         stream.py      bytes to a client      errors.py    status and body
prompt.py      messages → a request              generation.py  a request → deltas     types.py     what both are
models.py      which models are in memory        service.py     what routes share      settings.py  every limit
"""

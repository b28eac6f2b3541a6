"""OpenAI's API: /v1/chat/completions, completions, embeddings, models and responses.

schemas.py     bodies of the requests       messages.py   messages as templates read them
chat.py        chat completions             completions.py, embeddings.py, models.py
responses.py   responses                    response_events.py  their events
tools.py       tools and tool_choice        formats.py    usage, timings, logprobs
"""

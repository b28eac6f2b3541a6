"""Anthropic's API: /v1/messages and /v1/messages/count_tokens.

schemas.py   bodies of the requests      input.py    messages and tools as templates read them
messages.py  the routes                  events.py   content blocks and their events
"""

"""Ollama's API: /api/generate, chat, embed, and the models.

schemas.py     bodies of the requests       options.py    `options` to sampling parameters and back
chat.py        chat and generate            embeddings.py
models.py      tags, ps, version            show.py       one model
manage.py      pull, create, copy, delete   blobs.py      files that are sent in
"""

"""a typed answer by from_openai and from_ollama"""

import ollama
import openai
import outlines
from common import MODEL, URL, Flag

for model in (
    outlines.from_openai(openai.OpenAI(base_url=URL + "/v1", api_key="none"), MODEL),
    outlines.from_ollama(ollama.Client(host=URL), MODEL),
):
    Flag.model_validate_json(model("Is it so?", Flag))

"""a response model by tools and by JSON schema"""

import instructor
from common import MODEL, URL, Flag
from openai import OpenAI

for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=URL + "/v1", api_key="none"), mode=mode)
    hi = [{"role": "user", "content": "Is it so?"}]
    assert isinstance(client.chat.completions.create(model=MODEL, messages=hi, response_model=Flag), Flag)

"""an agent with an output type, streamed text"""

import asyncio

from common import MODEL, URL, Flag
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL + "/v1", api_key="none"))
assert isinstance(Agent(model, output_type=NativeOutput(Flag)).run_sync("Is it so?").output, Flag)
assert isinstance(Agent(model, output_type=Flag).run_sync("Is it so?").output, Flag)


async def streamed() -> list[str]:
    async with Agent(model).run_stream("hi") as result:
        return [text async for text in result.stream_text()]


assert asyncio.run(streamed())

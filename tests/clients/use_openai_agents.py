"""an agent with an output type over /v1/responses and /v1/chat/completions"""

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from common import MODEL, URL, Flag
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=URL + "/v1", api_key="none")
for model in (OpenAIResponsesModel(MODEL, client), OpenAIChatCompletionsModel(MODEL, client)):
    agent = Agent(name="a", instructions="Be brief.", model=model, output_type=Flag)
    assert isinstance(Runner.run_sync(agent, "Is it so?").final_output, Flag)

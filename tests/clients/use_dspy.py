"""Predict with a typed output"""

import dspy
from common import MODEL, URL

dspy.configure(lm=dspy.LM(f"openai/{MODEL}", api_base=URL + "/v1", api_key="none", cache=False, max_tokens=100))
found = dspy.Predict("question -> yes: bool")(question="Is it so?")
assert isinstance(found.yes, bool)

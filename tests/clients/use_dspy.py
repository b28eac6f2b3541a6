"""a call of the LM, and Predict (whose form is asked for in words, which a random model does not follow)"""

import dspy
from common import MODEL, URL
from dspy.utils.exceptions import AdapterParseError

dspy.configure(lm=dspy.LM(f"openai/{MODEL}", api_base=URL + "/v1", api_key="none", cache=False, max_tokens=100))
assert dspy.settings.lm("hi")
try:
    dspy.Predict("question -> yes: bool")(question="Is it so?")
except AdapterParseError as error:
    print(error)

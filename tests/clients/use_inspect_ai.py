"""eval of a task over openai-api/ and ollama/"""

import os
import tempfile

from common import MODEL, URL

os.environ |= {
    "TIERCEL_BASE_URL": URL + "/v1",
    "TIERCEL_API_KEY": "none",
    "OLLAMA_BASE_URL": URL + "/v1",
    "INSPECT_DISPLAY": "none",
}
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes

task = Task(dataset=[Sample(input="1 + 1 =", target="2")], scorer=includes())
for model in (f"openai-api/tiercel/{MODEL}", f"ollama/{MODEL}"):
    (log,) = eval(task, model=model, log_dir=tempfile.mkdtemp())
    assert log.status == "success", log.error

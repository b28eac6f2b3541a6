"""An OpenAI-compatible address as an `Answerer`: `--endpoint http://127.0.0.1:11434/v1`.

    POST {url}/chat/completions      with the chat template, which is the server's
    POST {url}/completions           plain

Every sample is a request of its own, `slots` of them at once.  A request that fails on the way is tried three more
times; then the run ends with one line, and what was finished is kept.  A key is read from TIERCEL_ENDPOINT_KEY.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

from tiercel.errors import ContextOverflow, ModelNotFound, RequestError, TiercelError
from tiercel.evals.answers import Answers, Ask, Question, Sample, Scored

MAX_TRIES, FIRST_PAUSE_SECONDS = 4, 1.0  # the pause doubles
MAX_RESPONSE_BYTES = 64 << 20
CONNECT_SECONDS, READ_SECONDS = 10.0, 3600.0  # long reasoning comes in one piece


class Endpoint:
    has_template = True
    likelihoods = False

    def __init__(
        self, url: str, model: str, *, pause: float = FIRST_PAUSE_SECONDS, timeout: float = READ_SECONDS
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(f"an endpoint is an address like http://127.0.0.1:11434/v1, not {url!r}")
        self.url, self.name, self.pause, self.timeout = url.rstrip("/"), model, pause, timeout
        self._parts = parts
        self._key = os.environ.get("TIERCEL_ENDPOINT_KEY", "")

    def about(self) -> dict[str, Any]:
        """Return name and address; which weights it serves is unknown."""
        return {"name": self.name, "endpoint": self.url}

    def score(self, contexts: Iterable[tuple[int, str, list[str]]], ask: Ask) -> Iterator[Scored]:
        raise RequestError(f"{self.url} gives no likelihoods; ask with --letters")

    def answer(self, questions: Iterable[Question], ask: Ask) -> Iterator[Answers]:
        waiting = iter(questions)
        parts: dict[int, list[tuple[Sample, int]]] = {}
        seconds: dict[int, float] = {}
        leaving = threading.Event()
        pool = concurrent.futures.ThreadPoolExecutor(ask.slots)
        jobs: dict[concurrent.futures.Future[tuple[Sample, int]], tuple[int, float]] = {}
        try:
            while True:
                while len(jobs) < 2 * ask.slots and (question := next(waiting, None)) is not None:
                    parts[question.key], seconds[question.key] = [], 0.0
                    for index in range(ask.samples):
                        job = pool.submit(self._sample, question, index, ask, leaving)
                        jobs[job] = (question.key, time.perf_counter())
                if not jobs:
                    return
                for job in concurrent.futures.wait(jobs, return_when=concurrent.futures.FIRST_COMPLETED)[0]:
                    key, began = jobs.pop(job)
                    try:
                        parts[key].append(job.result())
                    except ContextOverflow as error:
                        yield Answers(key, [], error=error)
                        parts.pop(key)
                        for other in [other for other, (whose, _) in jobs.items() if whose == key]:
                            other.cancel()
                            jobs.pop(other)
                        break
                    seconds[key] = max(seconds[key], time.perf_counter() - began)
                    if len(parts[key]) == ask.samples:
                        found = parts.pop(key)
                        yield Answers(key, [s for s, _ in found], found[0][1], 0, seconds.pop(key))
        finally:
            leaving.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _sample(self, question: Question, index: int, ask: Ask, leaving: threading.Event) -> tuple[Sample, int]:
        """One answer, and how many tokens its prompt had."""
        body: dict[str, Any] = {
            "model": self.name, "temperature": ask.temperature, "top_p": ask.top_p, "max_tokens": ask.max_tokens,
            "seed": (question.seed + index) % (1 << 31), "stream": False,
        }  # fmt: skip
        extras = {"top_k": ask.top_k, "min_p": ask.min_p, "stop": list(ask.stop)}
        body |= {name: value for name, value in extras.items() if value}
        if ask.think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": ask.think}
        if isinstance(question.prompt, str):
            found = self._post("/completions", body | {"prompt": question.prompt}, leaving)
        else:
            found = self._post("/chat/completions", body | {"messages": question.prompt}, leaving)
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            message = choice.get("message") or {"content": choice.get("text")}
            text, thinking = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
            sample = Sample(str(text or ""), str(thinking or ""), choice.get("finish_reason"),
                            int(usage.get("completion_tokens") or 0))  # fmt: skip
            return sample, int(usage.get("prompt_tokens") or 0)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise TiercelError(
                f"{self.url} answers something that is no completion: {json.dumps(found)[:120]}"
            ) from None

    def _post(self, path: str, body: dict[str, Any], leaving: threading.Event) -> Any:
        """The answer's JSON; a connection that breaks, 429 and 5xx are tried again."""
        why = ""
        for attempt in range(MAX_TRIES):
            if leaving.wait(self.pause * 2 ** (attempt - 1) if attempt else 0):
                break
            try:
                status, found = self._once(path, body)
            except (OSError, http.client.HTTPException) as error:
                why = str(error) or type(error).__name__
                continue
            except ValueError:
                why = "its answer is not JSON"
                continue
            if status == 200:
                return found
            words = _words(found, status)
            if status == 429 or status >= 500:
                why = words
                continue
            if status == 404:
                raise ModelNotFound(f"{self.url}: {words}")
            if status == 400 and "context" in words.lower():
                raise ContextOverflow(words)
            raise RequestError(f"{self.url} refuses: {words}")
        raise TiercelError(f"{self.url} does not answer ({why}); tried {MAX_TRIES} times. What was finished is kept: "
                           "the same command goes on from there")  # fmt: skip

    def _once(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(self.timeout)
            headers = {"Content-Type": "application/json"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request("POST", self._parts.path.rstrip("/") + path, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            data = response.read(MAX_RESPONSE_BYTES + 1)
            if len(data) > MAX_RESPONSE_BYTES:
                raise RequestError(f"{self.url} answers more than {MAX_RESPONSE_BYTES >> 20} MiB")
            return response.status, json.loads(data)
        finally:
            connection.close()


def _words(body: Any, status: int) -> str:
    error = body.get("error", body.get("message")) if isinstance(body, dict) else None
    words = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(words or f"status {status}").split())[:300]

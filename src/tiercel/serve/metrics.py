"""Counters for /metrics, in Prometheus' text format.  One registry per server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from tiercel.serve.models import Loaded
from tiercel.serve.types import Usage

BUCKET_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, descriptors
        self.requests = self._counter("requests", "HTTP requests", "route", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts", "model")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens that were not read again", "model")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated", "model")
        self.ttft = Histogram("tiercel_time_to_first_token_seconds", "From the request to its first token",
                              buckets=BUCKET_SECONDS, registry=self.registry)  # fmt: skip
        self.duration = Histogram("tiercel_answer_seconds", "From the request to its last token",
                                  buckets=BUCKET_SECONDS, registry=self.registry)  # fmt: skip
        self.in_flight = Gauge("tiercel_requests_in_flight", "Answers being made", registry=self.registry)
        self.loaded = Gauge("tiercel_models_loaded", "Models in memory", registry=self.registry)
        self.tasks = Gauge("tiercel_tasks", "Of the event loop", registry=self.registry)
        self.engine: dict[str, Gauge] = {}

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tiercel_{name}", text, labels, registry=self.registry)

    def first_token(self, seconds: float) -> None:
        """Record the time from a request to its first token."""
        self.ttft.observe(seconds)

    def answered(self, model: str, usage: Usage) -> None:
        """Record a request that has ended."""
        self.prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self.cached_tokens.labels(model).inc(usage.cached_tokens)
        self.generated_tokens.labels(model).inc(usage.completion_tokens)
        self.duration.observe(time.perf_counter() - usage.started)

    def render(self, in_flight: int, models: Iterable[Loaded]) -> bytes:
        """The page; the engines' figures are read now."""
        models = list(models)
        self.tasks.set(len(asyncio.all_tasks()))
        self.in_flight.set(in_flight)
        self.loaded.set(len(models))
        for loaded in models:
            stats = getattr(loaded.engine, "stats", None)
            for name, value in (vars(stats) if stats is not None else {}).items():
                if isinstance(value, (int, float)) and not name.startswith("_"):
                    if name not in self.engine:
                        self.engine[name] = Gauge(
                            f"tiercel_engine_{name}", f"Of the engine: {name}", ["model"], registry=self.registry
                        )
                    self.engine[name].labels(loaded.name).set(value)
        return generate_latest(self.registry)

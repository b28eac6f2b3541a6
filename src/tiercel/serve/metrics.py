"""Counters for /metrics, in Prometheus' text format.  One registry per server."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

TIMES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, descriptors
        self.requests = self._counter("requests", "HTTP requests", "route", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts", "model")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens that were not read again", "model")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated", "model")
        self.ttft = Histogram("tiercel_time_to_first_token_seconds", "From the request to its first token",
                              buckets=TIMES, registry=self.registry)  # fmt: skip
        self.duration = Histogram("tiercel_answer_seconds", "From the request to its last token",
                                  buckets=TIMES, registry=self.registry)  # fmt: skip
        self.in_flight = Gauge("tiercel_requests_in_flight", "Answers being made", registry=self.registry)
        self.loaded = Gauge("tiercel_models_loaded", "Models in memory", registry=self.registry)
        self.tasks = Gauge("tiercel_tasks", "Of the event loop", registry=self.registry)
        self.engine: dict[str, Gauge] = {}

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tiercel_{name}", text, labels, registry=self.registry)

    def first_token(self, seconds: float) -> None:
        self.ttft.observe(seconds)

    def answered(self, model: str, counts: Any) -> None:
        import time

        self.prompt_tokens.labels(model).inc(counts.prompt)
        self.cached_tokens.labels(model).inc(counts.cached)
        self.generated_tokens.labels(model).inc(counts.said)
        self.duration.observe(time.perf_counter() - counts.began)

    def text(self, service: Any) -> bytes:
        """The page; figures of the engines are read when it is asked for."""
        import asyncio

        self.tasks.set(len(asyncio.all_tasks()))
        self.in_flight.set(len(service.running))
        self.loaded.set(len(service.models.loaded))
        for loaded in service.models.loaded.values():
            for name, value in vars(getattr(loaded.engine, "stats", None) or object.__new__(_Empty)).items():
                if isinstance(value, (int, float)) and not name.startswith("_"):
                    if name not in self.engine:
                        self.engine[name] = Gauge(
                            f"tiercel_engine_{name}", f"Of the engine: {name}", ["model"], registry=self.registry
                        )
                    self.engine[name].labels(loaded.name).set(value)
        return generate_latest(self.registry)


class _Empty:
    pass

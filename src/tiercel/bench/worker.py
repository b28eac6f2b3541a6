"""One engine in a process of its own:   python -m tiercel.bench.worker '{"engine": "tiercel", "path": …}'

It loads, prints one JSON line about itself, and then answers every line of its input (a round's order) with one
line of what was measured, until the input ends.  Between rounds it waits for the pipe and takes no core.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from typing import Any, Protocol

import torch

from tiercel.bench.case import SHORT_PROMPT
from tiercel.bench.rss import peak_rss

BUFFER_BYTES = 1 << 29
PREFILL = {"cpu": 512, "cuda": 8192}  # tokens per call and row: as in `generate`; what fills a GPU


class Network(Protocol):
    """What transformers and Tiercel have in common: a memory for some rows, and a call that feeds tokens to them."""

    vocabulary: int
    device: str

    def empty(self, rows: int) -> Any: ...

    def feed(self, tokens_BL: torch.Tensor, memory: Any) -> Any:
        """Run the tokens and compute the logits of the last; the memory afterwards."""

    def fork(self, memory: Any) -> Any: ...

    def step_bytes(self, context: int, rows: int) -> int: ...


def wait() -> None:
    """Wait for the GPU, where one is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def rates(network: Network, order: dict[str, Any], kept: dict[Any, Any]) -> dict[str, Any]:
    """One round: tokens per second of each prefill and of decode.  kept: contexts that were read in earlier rounds."""
    rows, context, count = order["batch"], order["context"], order["generate"]
    out: dict[str, Any] = {"prefill": {}}
    for length in order["prompts"]:
        tokens_BL, memory = _tokens(network, rows, length), network.empty(rows)
        began = time.perf_counter()
        read(network, tokens_BL, memory)
        wait()
        out["prefill"][str(length)] = rows * length / (time.perf_counter() - began)
        del memory
    if count:
        if context and (rows, context) not in kept:
            kept[rows, context] = read(network, _tokens(network, rows, context), network.empty(rows))
        token_B1 = _tokens(network, rows, 1)
        memory = network.fork(kept[rows, context]) if context else network.empty(rows)
        memory = network.feed(token_B1, memory)  # not counted: buffers grow here
        wait()
        began = time.perf_counter()
        for _ in range(count):
            memory = network.feed(token_B1, memory)
        wait()
        out["decode"] = rows * count / (time.perf_counter() - began)
        out["bytes_per_step"] = network.step_bytes(context + 1 + count // 2, rows)
    return out


def read(network: Network, tokens_BL: torch.Tensor, memory: Any) -> Any:
    each = PREFILL[network.device]
    for start in range(0, tokens_BL.shape[1], each):
        memory = network.feed(tokens_BL[:, start : start + each], memory)
    return memory


def _tokens(network: Network, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(network.vocabulary, (rows, length), generator=generator)


class Tiercel:
    def __init__(self, order: dict[str, Any]) -> None:
        import tiercel
        from tiercel.bench.traffic import weight_bytes
        from tiercel.model.cpu_runner import CPURunner
        from tiercel.plan import parameter_count

        began = time.perf_counter()
        self.network = self._load(order)
        self.device = order.get("device", "cpu")
        if self.device != "cpu":
            from tiercel.model.gpu_layout import to_device
            from tiercel.model.gpu_runner import GPURunner

            to_device(self.network, self.device)
            self.runner: Any = GPURunner(self.network, 2 * order["rows"], order["longest"])
        else:
            self.runner = CPURunner(self.network)
        loaded = time.perf_counter()
        config = self.network.config
        self.vocabulary = config.vocab_size
        self.feed(_tokens(self, 1, SHORT_PROMPT), self.empty(1))
        self.about = {
            "version": tiercel.__version__,
            "architecture": self.architecture,
            "parameters": parameter_count(config),
            "load_s": round(loaded - began, 3),
            "first_token_s": round(time.perf_counter() - began, 3),
            "weights_bytes": weight_bytes(self.network),
        }
        self.kept: dict[Any, Any] = {}

    def _load(self, order: dict[str, Any]) -> Any:
        from tiercel import api
        from tiercel.bench.models import random_source
        from tiercel.weights import load

        if "random" not in order:
            model = api.load(order["path"], dtype=order["dtype"])
            self.architecture = model.layout.family.name
            return model.network
        source = random_source(order["model"], order["random"])
        self.architecture = source.layout.family.name
        return load.of_source(source, order["dtype"])

    def empty(self, rows: int) -> list[Any]:
        return [self.runner.new_state() for _ in range(rows)]

    def feed(self, tokens_BL: torch.Tensor, memory: list[Any]) -> list[Any]:
        self.runner.forward(list(tokens_BL.to(self.device)), memory)
        return memory

    def fork(self, memory: list[Any]) -> list[Any]:
        return [state.fork() for state in memory]

    def step_bytes(self, context: int, rows: int) -> int:
        from tiercel.bench.traffic import bytes_per_step

        return bytes_per_step(self.network, context, rows)

    def round(self, order: dict[str, Any]) -> dict[str, Any]:
        return rates(self, order, self.kept)


class Transformers:
    def __init__(self, order: dict[str, Any]) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        began = time.perf_counter()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(order["path"], dtype=torch.bfloat16).eval()
        self.device = order.get("device", "cpu")
        self.model.to(self.device)
        loaded = time.perf_counter()
        self.vocabulary = self.model.config.vocab_size
        self.feed(_tokens(self, 1, SHORT_PROMPT), None)
        self.about = {
            "version": transformers.__version__,
            "load_s": round(loaded - began, 3),
            "first_token_s": round(time.perf_counter() - began, 3),
        }
        self.kept: dict[Any, Any] = {}

    def empty(self, rows: int) -> None:
        return None

    @torch.inference_mode()
    def feed(self, tokens_BL: torch.Tensor, memory: Any) -> Any:
        tokens_BL = tokens_BL.to(self.device)
        return self.model(tokens_BL, past_key_values=memory, use_cache=True, logits_to_keep=1).past_key_values

    def fork(self, memory: Any) -> Any:
        return copy.deepcopy(memory)

    def step_bytes(self, context: int, rows: int) -> int:
        return 0

    def round(self, order: dict[str, Any]) -> dict[str, Any]:
        return rates(self, order, self.kept)


class Memory:
    """Sums of a large buffer: nothing but reading.  On a GPU copies of it, and products of bfloat16 matrices."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.device = order.get("device", "cpu")
        size = BUFFER_BYTES if self.device == "cpu" else 1 << 32
        self.buffer = torch.ones(size // 8, dtype=torch.int64, device=self.device)
        self.about = {} if self.device == "cpu" else {"device_name": torch.cuda.get_device_name()}

    def round(self, order: dict[str, Any]) -> dict[str, Any]:
        if self.device != "cpu":
            return self._on_device()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            self.buffer.sum()
            times.append(time.perf_counter() - began)
        return {"bandwidth_gb_s": self.buffer.nbytes / min(times) / 1e9}

    def _on_device(self) -> dict[str, Any]:
        other = torch.empty_like(self.buffer)
        a, b = (torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        seconds = {}
        for name, run in (("copy", lambda: other.copy_(self.buffer)), ("product", lambda: a @ b)):
            for times in (3, 10):
                wait()
                began = time.perf_counter()
                for _ in range(times):
                    run()
                wait()
                seconds[name] = (time.perf_counter() - began) / times
        copied = 2 * self.buffer.nbytes / seconds["copy"] / 1e9
        return {"bandwidth_gb_s": copied, "product_tflops": 2 * 8192**3 / seconds["product"] / 1e12}


ENGINES: dict[str, Any] = {"tiercel": Tiercel, "transformers": Transformers, "memory": Memory}


def memory() -> dict[str, int]:
    """The most bytes so far."""
    found = {"peak_rss_bytes": peak_rss(os.getpid())}
    return found | ({"peak_device_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_initialized() else {})


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        order = json.loads(sys.argv[1])
        torch.set_num_threads(order["threads"])
        engine = ENGINES[order["engine"]](order)
        reply({**engine.about, **memory()})
        for line in sys.stdin:
            measured = engine.round(json.loads(line))
            reply({**measured, **memory()})
    except Exception as error:
        if os.environ.get("TIERCEL_DEBUG") == "1":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reply({"error": lines[0], "kind": type(error).__name__})


if __name__ == "__main__":
    main()

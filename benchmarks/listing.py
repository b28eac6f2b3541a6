"""CPU time of /api/tags and /v1/models after the first call.

    python benchmarks/listing.py [--models 100] [--calls 50]

Models are made from one small random file, each with a system message of its own, in a home that is removed
afterwards; a server of its own process is asked, and its process_cpu_seconds_total read before and after.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 256,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1024,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}  # fmt: skip


def ask(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    data = connection.getresponse().read()
    connection.close()
    return data


def cpu_seconds(port: int) -> float:
    lines = ask(port, "/metrics").decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("process_cpu_seconds_total"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--calls", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"TIERCEL_HOME": home, "HF_HUB_CACHE": home + "/hub"}
        from tiercel.bench.models import random_source
        from tiercel.hub import local_models, store
        from tiercel.weights.export import export

        config, file = Path(home) / "config.json", Path(home) / "base.gguf"
        config.write_text(json.dumps(SHAPE))
        export(random_source(str(config), "q4_k_m"), file, name="base")
        base = local_models.find(str(file))
        assert base is not None
        for index in range(args.models - 1):
            store.put(f"made{index}", base, {"system": f"You are number {index}.", "from": "base"})
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        command = [sys.executable, "-m", "tiercel", "serve", "--port", str(port)]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            while True:
                try:
                    ask(port, "/health")
                    break
                except OSError:
                    time.sleep(0.1)
            time.sleep(2.0)
            for path in ("/api/tags", "/v1/models"):
                began = cpu_seconds(port)
                ask(port, path)
                first = cpu_seconds(port) - began
                began = cpu_seconds(port)
                for _ in range(args.calls):
                    ask(port, path)
                each = (cpu_seconds(port) - began) / args.calls
                print(
                    f"{path}: {args.models} models, first call {1000 * first:.0f} ms of CPU, then {1000 * each:.1f} ms"
                )
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()

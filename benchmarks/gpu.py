"""One GPU: Falcon-H1R-7B's exact shape with random weights made on the device; one table and a JSON file.

    PYTHONPATH=src OUT=out python benchmarks/gpu.py                      everything, about ten minutes on an H100
    PYTHONPATH=src OUT=out python benchmarks/gpu.py --rows correct,decode1 --budget 150

A row that fails prints its traceback and the others go on; no row begins when --budget seconds are over.  Rooflines
are measured here too: a copy of 4 GB (bytes read and written) and a bfloat16 product of 8192³.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tiercel.families import from_hf
from tiercel.families.pattern import pattern
from tiercel.families.shapes import shape
from tiercel.model.config import ModelConfig
from tiercel.model.cuda_graphs import CUDAGraphRunner
from tiercel.model.cuda_graphs import prefill as read
from tiercel.model.decoder import Decoder
from tiercel.model.gpu_layout import fuse
from tiercel.model.initialize import deviation, fresh, initialize
from tiercel.model.layers import Embedding, Linear, set_weight
from tiercel.model.pages import PAGE
from tiercel.model.parameters import parameters
from tiercel.model.state_cache import StateCache
from tiercel.ops.triton.linear import DeviceQTensor, gated
from tiercel.ops.triton.tiled import Tile, tile
from tiercel.ops.triton.tiled import product as tiled_product
from tiercel.sampling.params import SamplingParams
from tiercel.sampling.sampler import Draw

MODEL = "falcon-h1r:7b"
# about as many parameters and the context of today: 32 layers, eight key/value heads
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 65536, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip
RESULT: dict[str, Any] = {}


def config_of(name: str) -> ModelConfig:
    return from_hf(LLAMA if name == "llama" else shape(name)).config


def seconds(run: Callable[[], Any], times: int, warm: int = 2) -> float:
    """Of one run, on the device's clock."""
    for _ in range(warm):
        run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def note(**values: Any) -> None:
    for key, value in values.items():
        RESULT[key] = value
        print(f"    {key:44s} {value:,.4g}" if isinstance(value, float) else f"    {key:44s} {value}", flush=True)


# ── networks


def network(name: str, kind: str = "bf16") -> Decoder:
    """A network of a published shape with random weights, made on the device.  kind: bf16, Q4_K, Q8_0, NF4, INT8"""
    config = config_of(name)
    with torch.device("meta"):
        net = Decoder(config).eval().requires_grad_(False)
    depth, g, table = len(config.layers), torch.Generator().manual_seed(0), parameters(config)
    torch.manual_seed(0)
    for owner, module in net.named_modules():
        for leaf, p in list(module._parameters.items()):
            if p is None or (module is net.head and config.tied):
                continue
            full = f"{owner}.{leaf}" if owner else leaf
            matrix = isinstance(module, (Linear, Embedding)) and leaf == "weight"
            if matrix and kind != "bf16":
                set_weight(module, leaf, packed(kind, tuple(p.shape), deviation(table[full], depth)))
                continue
            if matrix:
                w = torch.empty(p.shape, dtype=torch.bfloat16, device="cuda").normal_(0, deviation(table[full], depth))
            else:
                dtype = torch.float32 if table[full].fp32_on_gpu else torch.bfloat16
                w = fresh(table[full], depth, g).to("cuda", dtype)
            set_weight(module, leaf, torch.nn.Parameter(w, requires_grad=False))
    net._tie()
    fuse(net)
    return net


def packed(kind: str, size: tuple[int, int], spread: float) -> DeviceQTensor:
    """Random bits whose values have mean 0 and this spread."""
    N, K = size

    def bits(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")

    def same(value: float, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device="cuda")

    if kind == "Q4_K":  # scales 40 ± 8, minima 7.5 of them
        scales = torch.full((N, K // 32, 2), 40, dtype=torch.uint8, device="cuda")
        d = spread / (40 * 4.6)
        ends = torch.tensor([d, 7.5 * d], dtype=torch.float16, device="cuda").expand(N, K // 256, 2).contiguous()
        return DeviceQTensor(kind, size, bits(N, K // 2), scales, ends)
    if kind == "Q6_K":
        d = torch.full((N, K // 256), spread / (40 * 18.5), dtype=torch.float16, device="cuda")
        scales = torch.full((N, K // 16), 40, dtype=torch.int8, device="cuda")
        return DeviceQTensor(kind, size, bits(N, K // 2), scales, d, bits(N, K // 4))
    if kind == "NF4":
        return DeviceQTensor(kind, size, bits(N, K // 2), same(spread / 0.6, torch.float32, N, K // 64))
    if kind == "FP8":
        q = torch.randn(N, K, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
        return DeviceQTensor(kind, size, q, same(spread, torch.float32, N))
    q = bits(N, K).view(torch.int8)
    if kind == "Q8_0":
        return DeviceQTensor(kind, size, q, same(spread / 74, torch.float16, N, K // 32))
    return DeviceQTensor(kind, size, q, same(spread / 74, torch.float32, N))


def weight_bytes(net: Decoder) -> int:
    """What a step reads: everything but the embedding."""
    total = 0
    for module in net.modules():
        for leaf in [*module._parameters, *vars(module)]:
            w = getattr(module, leaf, None)
            if module is not net.embed and isinstance(w, (torch.nn.Parameter, DeviceQTensor)):
                total += w.nbytes
    return total


def filled(net: Decoder, rows: int, context: int, room: int, pages: int | None = None) -> tuple[StateCache, list[int]]:
    """Texts of so many random tokens: the memory's contents do not change the time, so nothing is computed."""
    slots = StateCache(net, rows, context + room, pages)
    for layer in slots.layers:
        for memory in layer:
            for t in memory.buffers.values():
                t.uniform_(0, 0.1) if memory in slots.recurrent else t.normal_()
    numbers = [slots.take() for _ in range(rows)]
    for slot in numbers:
        slots.reserve(slot, context + room)
        slots.set_position(slot, context, (context - 1) // slots.chunk * slots.chunk)
    slots.publish()
    return slots, numbers


def decode(net: Decoder, rows: int, context: int, steps: int, pages: int | None = None) -> tuple[float, int]:
    """Seconds of a step, greedy tokens fed back on the device, and the bytes of the memories."""
    slots, numbers = filled(net, rows, context, steps + 8, pages)
    graph = CUDAGraphRunner(net, slots, (rows,)).of(rows)
    graph.slot_B.copy_(torch.tensor(numbers, dtype=torch.int32))

    def step() -> None:
        graph.tokens.copy_(graph.run().argmax(-1))

    return seconds(step, steps), slots.nbytes


def decode_sampled(net: Decoder, rows: int, context: int, steps: int) -> float:
    """Seconds of a step whose tokens are drawn on the device: temperature 0.8, top_k 40, top_p 0.9."""
    slots, numbers = filled(net, rows, context, steps + 8)
    graphs = CUDAGraphRunner(net, slots, (rows,))
    draws = [Draw(0.8, 0.0, 40, 0.9, 0.5)] * rows

    def step() -> None:
        graph = graphs.launch(numbers, [-1] * rows)
        graph.sampler(graph.logits, numbers, draws, net.config.vocab_size)

    return seconds(step, steps)


def decode_in_engine(net: Decoder, rows: int, steps: int) -> float:
    """Tokens a second of answers that the engine schedules, samples as above and hands out, without their text."""
    from types import SimpleNamespace

    from tiercel.engine.engine import Engine

    model: Any = SimpleNamespace(network=net, tokenizer=None, max_length=512)
    engine = Engine(model, slots=rows, cache_bytes=0)
    params = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, max_tokens=steps + 16, ignore_eos=True)
    requests = [engine.add(list(range(8 + i, 72 + i)), params) for i in range(rows)]
    while any(len(request.sequences[0].token_ids) < 8 for request in requests):
        engine.step()
    torch.cuda.synchronize()
    begin, said = time.perf_counter(), sum(len(request.sequences[0].token_ids) for request in requests)
    for _ in range(steps):
        engine.step()
    count = sum(len(request.sequences[0].token_ids) for request in requests) - said
    return count / (time.perf_counter() - begin)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# ── rows


def roofline() -> None:
    a = torch.empty(1 << 31, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    note(copy_GBps=2 * a.nbytes / seconds(lambda: b.copy_(a), 10) / 1e9)
    x, w = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    note(matmul_TFLOPS=2 * 8192**3 / seconds(lambda: x @ w, 20, 5) / 1e12)


NASTY = {
    "side by side": ("attention+mamba2", dict(heads=6, kv_heads=2, head_dim=10, groups=3, mamba_head_dim=8, state=7)),
    "in turn, experts": ("mamba2 attention/moe mamba2/-", dict(heads=5, kv_heads=1, head_dim=16, groups=1, state=24)),
    "attention alone": ("attention", dict(heads=4, kv_heads=4, head_dim=24, window=17)),
    "long heads": ("attention+mamba2", dict(heads=12, kv_heads=2, head_dim=128, mamba_head_dim=128, state=256)),
}


def correct() -> None:
    """Logits here against float32 on the CPU: a prompt, pieces, then steps of two texts through the graph."""
    worst = {"fp32": 0.0, "bf16": 0.0}
    for name, (layers, sizes) in NASTY.items():
        sizes = dict(width=96, vocab_size=300, repeat=2, ffn_width=160, chunk=16, norm_eps=1e-3) | sizes
        for dtype, key in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            net = Decoder(pattern(layers, **sizes))  # type: ignore[arg-type]
            initialize(net, 1)
            net.eval().requires_grad_(False).to(dtype)
            net.embed.weight.mul_(30)
            g = torch.Generator().manual_seed(0)
            texts = [torch.randint(0, 300, (n,), generator=g) for n in (150, 83)]
            judge = Decoder(net.config).eval().requires_grad_(False)
            judge.load_state_dict(net.state_dict())
            expected = [judge(text) for text in texts]
            net.to("cuda")
            fuse(net)
            slots = StateCache(net, 4, 200)
            numbers, got, want = [slots.take() for _ in texts], [], []
            for slot, text, whole in zip(numbers, texts, expected, strict=True):
                got.append(read(net, slots, [slot], [text[:41].cuda()], logits_to_keep=41))
                got.append(read(net, slots, [slot], [text[41:60].cuda()], logits_to_keep=19))
                want.append(whole[:60])
            graphs = CUDAGraphRunner(net, slots, (4,))
            for i in range(60, 83):
                got.append(graphs.step(numbers, torch.stack([t[i] for t in texts]).cuda()).clone())
                want.append(torch.stack([whole[i] for whole in expected]))
            got_, want_ = torch.cat(got).float().cpu(), torch.cat(want)
            error = float((got_ - want_).norm() / want_.norm())
            worst[key] = max(worst[key], error) if math.isfinite(error) else math.inf
            print(f"      {name:20s} {key} {error:.2e}", flush=True)
    note(error_fp32=worst["fp32"], error_bf16=worst["bf16"])
    correct_packed()


def correct_packed() -> None:
    note(error_packed=max(_packed_error(kind) for kind in ("Q4_K", "Q6_K", "Q8_0", "INT8", "NF4")))


def _packed_error(kind: str) -> float:
    """Products of 1, 8 and 32 rows, a gate and a sum against the numbers that the bits stand for; inputs of eight bits
    cost about 0.005."""
    m, up = packed(kind, (1088, 3072), 0.02), packed(kind, (1088, 3072), 0.02)
    W, U, worst = m.numbers(), up.numbers(), 0.0
    for rows in (1, 8, 32):
        x = torch.randn(rows, 3072, device="cuda")
        pairs = [(m.multiply(x), x @ W.T)]
        if rows == 1 and m.takes_q8:
            base = torch.randn(1, 1088, device="cuda")
            pairs.append((m.fused(x, base=base) - base, x @ W.T))
            pairs.append((gated(x, m, up, "silu"), torch.nn.functional.silu(x @ W.T) * (x @ U.T)))
        worst = max([worst, *(float((got - want).norm() / want.norm()) for got, want in pairs)])
    print(f"      {kind:20s} {worst:.2e}", flush=True)
    return worst


def decode1() -> None:
    net = network(MODEL)
    note(parameters=sum(p.numel() for p in net.parameters()), bf16_GB=weight_bytes(net) / 1e9)
    time_, _ = decode(net, 1, 512, 100)
    note(decode1_bf16_tok_s=1 / time_)
    note(decode1_bf16_sampled_tok_s=1 / decode_sampled(net, 1, 512, 50))
    for rows in (1, 32):
        note(**{f"decode{rows}_bf16_engine_tok_s": decode_in_engine(net, rows, 60)})
        if rows > 1:
            note(**{f"decode{rows}_bf16_sampled_tok_s": rows / decode_sampled(net, rows, 100, 30)})
    if "copy_GBps" in RESULT:
        note(decode1_bf16_of_bandwidth=weight_bytes(net) / 1e9 / RESULT["copy_GBps"] / time_)


def profile() -> None:
    """Where a step's time goes, kernel by kernel."""
    for kind, rows, context in (("bf16", 1, 512), ("bf16", 32, 4096), ("Q4_K", 1, 512)):
        net = network(MODEL, kind)
        slots, numbers = filled(net, rows, context, 50)
        graph = CUDAGraphRunner(net, slots, (rows,)).of(rows)
        graph.slot_B.copy_(torch.tensor(numbers, dtype=torch.int32))
        graph.run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            for _ in range(5):
                graph.run()
            torch.cuda.synchronize()
        print(f"── {kind}, {rows} rows")
        for e in sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)[:16]:
            print(f"      {e.self_device_time_total / 5e3:8.3f} ms {e.count // 5:5d} × {e.key[:90]}")
        del net, slots, graph
        free()


def decode1_packed() -> None:
    for kind in ("Q4_K", "Q6_K", "Q8_0", "INT8", "NF4"):
        net = network(MODEL, kind)
        time_, _ = decode(net, 1, 512, 60)
        note(**{f"decode1_{kind}_tok_s": 1 / time_, f"{kind}_GB": weight_bytes(net) / 1e9})
        if "decode1_bf16_tok_s" in RESULT:
            note(**{f"{kind}_times_bf16": 1 / time_ / RESULT["decode1_bf16_tok_s"]})
        if kind == "Q4_K":
            note(decode1_Q4_K_sampled_tok_s=1 / decode_sampled(net, 1, 512, 50))
            for rows in (8, 32):
                note(**{f"decode{rows}_Q4_K_tok_s": rows / decode(net, rows, 512, 20)[0]})
        if "copy_GBps" in RESULT:
            note(**{f"decode1_{kind}_of_bandwidth": weight_bytes(net) / 1e9 / RESULT["copy_GBps"] / time_})
        del net
        free()


# of the 7B: gate and up, down, what the mixers read from, out_proj
SOME_SHAPES = (12288, 3072), (3072, 12288), (8728, 3072), (3072, 3072)
SOME_TILES = (
    Tile(64, 2, 4, 4), Tile(64, 4, 4, 3), Tile(64, 4, 4, 4), Tile(128, 2, 4, 3), Tile(128, 2, 8, 4), Tile(128, 4, 8, 3)
)  # fmt: skip


def some() -> None:
    """GB/s of Q4_K products of 8 and 32 rows by each tile and number of pieces of K, weights from memory; the best, and
    what `tiled.tile` chooses today."""
    for N, K in SOME_SHAPES:
        copies = [packed("Q4_K", (N, K), 0.02) for _ in range(math.ceil(2.5e8 / (N * K * 0.5625)))]  # beyond the cache
        for T in (8, 32):
            x, reached = torch.randn(T, K, device="cuda", dtype=torch.bfloat16), {}
            expected = x.float() @ copies[0].numbers().T
            chosen = tile(T, N, K)
            for by in (chosen, *(t._replace(pieces=p) for t in SOME_TILES for p in (1, 2, 3, 4, 6, 8))):
                if K // 64 % (by.groups * by.pieces) or K // 64 // (by.groups * by.pieces) < 2:
                    continue
                if by != chosen and not 100 <= by.pieces * math.ceil(N / by.outputs) <= 1000:
                    continue
                try:
                    error = (by_tile(x, copies[0], by).float() - expected).norm() / expected.norm()
                    assert error < 1e-2, f"{by}: off by {error:.3g}"
                    reached[by] = copies[0].nbytes / graph_seconds([partial(by_tile, x, m, by) for m in copies]) / 1e9
                except Exception as error:  # too much shared memory, say: the others are still of interest
                    print(f"      {by}: {error}", flush=True)
            for by, rate in sorted(reached.items(), key=lambda item: -item[1])[:8]:
                print(f"      {T:2d} rows of {N} x {K}: {rate:7.0f} GB/s  {by}", flush=True)
            best = max(reached, key=lambda by: reached[by])
            note(**{f"some_{T}_{N}x{K}_best": f"{reached[best]:.0f} GB/s {tuple(best)}"})
            note(**{f"some_{T}_{N}x{K}_chosen_GBps": reached.get(chosen, 0.0)})
        del copies
        free()


def by_tile(x: torch.Tensor, m: DeviceQTensor, by: Tile) -> torch.Tensor:
    return tiled_product(x, m.type, (m.shape[0], m.shape[1]), m.bytes, by=by)


def graph_seconds(runs: list[Callable[[], Any]]) -> float:
    """Of one of these, recorded one after another: launches from Python would cost more than they do."""
    runs[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return seconds(graph.replay, 10) / len(runs)


def decode32() -> None:
    net = network(MODEL)
    for rows, context in ((8, 16384), (32, 16384)):
        time_, memory = decode(net, rows, context, 40)
        note(**{f"decode{rows}_16k_tok_s": rows / time_, f"decode{rows}_16k_memory_GB": memory / 1e9})
        if rows == 32:
            note(decode32_16k_sampled_tok_s=rows / decode_sampled(net, rows, context, 20))
        free()


def scan() -> None:
    """The chunk scan alone, 8K tokens of one layer, beside mamba-ssm's kernel where it is installed."""
    from tiercel.mixers.mamba2.triton_prefill import ssd

    H, P, N, L = 24, 128, 256, 8192
    xBC = torch.randn(L, H * P + 2 * N, device="cuda", dtype=torch.bfloat16) / 8
    dt, A, D = torch.rand(L, H, device="cuda") / 10, -torch.rand(H, device="cuda") - 0.1, torch.ones(H, device="cuda")
    S = torch.zeros(H, N, P, device="cuda")
    note(scan_8192_ms=1e3 * seconds(lambda: ssd(xBC, dt, A, D, S, groups=1, skip=0, commit=L), 10))
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        note(mamba_ssm=f"not installed ({error})")
        return
    x, B, C = (t.contiguous() for t in xBC.split((H * P, N, N), 1))
    x, B, C = x.view(1, L, H, P), B.view(1, L, 1, N), C.view(1, L, 1, N)
    time_ = seconds(lambda: mamba_chunk_scan_combined(x, dt.unsqueeze(0), A, B, C, 256, D=D), 10)
    note(mamba_ssm_scan_8192_ms=1e3 * time_)


def training_scan() -> None:
    """The packed scan both ways under autocast, 16 rows of 1,024 tokens in documents of 200, beside torch."""
    from tiercel.mixers.mamba2.varlen import chunks_of, ssd_documents, ssd_varlen
    from tiercel.model.varlen import VarlenBatch

    H, P, N, rows, L = 24, 64, 128, 16, 1024
    starts = (torch.arange(L, device="cuda") % 200 == 0).expand(rows, L)
    batch = VarlenBatch(starts)
    x, B, C = (torch.randn(rows * L, *size, device="cuda") / 4 for size in ((H, P), (1, N), (1, N)))
    dt, A, D = torch.rand(rows * L, H, device="cuda") / 10, -torch.rand(H, device="cuda") - 0.1, torch.ones(H).cuda()
    given, chunks = [t.requires_grad_() for t in (C, x, dt, A, B, D)], chunks_of(batch, 64, torch.float32)
    weigh, grads = torch.randn_like(x), {}

    def run(way: Callable[..., torch.Tensor], *more: Any) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad(), torch.autocast("cuda", torch.bfloat16):
            y = way(*given, *more)
        return y.detach(), *torch.autograd.grad(y, given, weigh)

    for name, way, more in (("torch", ssd_varlen, (chunks,)), ("kernels", ssd_documents, (batch,))):
        grads[name] = run(way, *more)
        note(**{f"training_scan_{name}_ms": 1e3 * seconds(lambda w=way, m=more: run(w, *m), 10)})
    for name, a, b in zip(["y", *"C x dt A B D".split()], grads["kernels"], grads["torch"], strict=True):
        note(**{f"training_scan_difference_{name}": float((a - b).norm() / b.norm())})


def prefill() -> None:
    net = network(MODEL)
    slots = StateCache(net, 1, 16384)
    for length in (512, 2048, 8192):
        ids = torch.randint(0, net.config.vocab_size, (length,), device="cuda")

        def run(ids: torch.Tensor = ids) -> None:
            slot = slots.take()
            read(net, slots, [slot], [ids])
            slots.release(slot)

        time_ = seconds(run, 3)
        matrices = sum(m.weight.numel() for m in net.modules() if isinstance(m, Linear) and m is not net.head)
        attention = sum(
            2 * length**2 * m.heads * m.head_dim
            for lay in net.config.layers
            for m in lay.mixers
            if m.kind == "attention"
        )
        rate = (2 * matrices * length + attention) / time_ / 1e12
        note(**{f"prefill_{length}_tok_s": length / time_, f"prefill_{length}_TFLOPS": rate})
        if "matmul_TFLOPS" in RESULT:
            note(**{f"prefill_{length}_of_matmul": rate / RESULT["matmul_TFLOPS"]})


def context32k() -> None:
    """Against a Llama-shaped network of about the same size, 32 texts at 32K; as many as fit where they do not."""
    for name in (MODEL, "llama"):
        net = network(name)
        here = "falcon" if name == MODEL else "llama"
        room = torch.cuda.get_device_properties(0).total_memory - torch.cuda.memory_allocated() - (6 << 30)
        probe = StateCache(net, 1, PAGE, pages=2)
        page = sum(group.page_nbytes for group in probe.groups)
        fixed = sum(part.nbytes for part in probe.recurrent)
        text = page * (32768 // PAGE + 2) + fixed
        rows = min(32, room // text)
        note(**{f"{here}_32k_bytes_of_32_texts_GB": 32 * text / 1e9, f"{here}_32k_texts_that_fit": rows})
        del probe
        time_, _ = decode(net, rows, 32768, 30)
        note(**{f"{here}_32k_tok_s": rows / time_})
        del net
        free()


def transformers_() -> None:
    """The same shape in transformers, bfloat16, with whatever kernels it finds here."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = shape(MODEL)
    config = AutoConfig.for_model(**{k: v for k, v in hf.items() if k != "architectures"})
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    note(transformers=transformers.__version__)
    for kernel in ("mamba_ssm", "causal_conv1d", "flash_attn"):
        with contextlib.suppress(ImportError):
            __import__(kernel)
            note(**{f"transformers_has_{kernel}": True})
    ids = torch.randint(0, config.vocab_size, (1, 128), device="cuda")
    with torch.inference_mode():
        out = model(ids, use_cache=True)
        past, token, at = out.past_key_values, ids[:, -1:], 128

        def step() -> None:
            nonlocal token, at
            out = model(token, past_key_values=past, use_cache=True, cache_position=torch.tensor([at], device="cuda"))
            token, at = out.logits[:, -1:].argmax(-1), at + 1

        time_ = seconds(step, 20, 3)
        note(transformers_decode1_tok_s=1 / time_)
        if "decode1_bf16_tok_s" in RESULT:
            note(times_transformers=RESULT["decode1_bf16_tok_s"] * time_)
        for length in (512, 2048, 8192):
            ids = torch.randint(0, config.vocab_size, (1, length), device="cuda")
            note(
                **{
                    f"transformers_prefill_{length}_tok_s": length
                    / seconds(lambda i=ids: model(i, logits_to_keep=1), 1, 1)
                }
            )


ROWS: dict[str, Callable[[], None]] = {
    "roofline": roofline, "correct": correct, "correct_packed": correct_packed, "some": some, "decode1": decode1,
    "packed": decode1_packed, "decode32": decode32,
    "prefill": prefill, "scan": scan, "training_scan": training_scan, "transformers": transformers_,
    "context32k": context32k, "profile": profile,
}  # fmt: skip


ASKED_FOR = "profile", "some", "correct_packed"  # run by name only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(name for name in ROWS if name not in ASKED_FOR))
    parser.add_argument("--budget", type=float, default=580, help="seconds after which no row begins")
    options = parser.parse_args()
    begin = time.monotonic()
    import triton

    note(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    failed = []
    for name in options.rows.split(","):
        if time.monotonic() - begin > options.budget:
            failed.append(f"{name}: no time left")
            continue
        print(f"── {name}  ({time.monotonic() - begin:.0f} s)", flush=True)
        try:
            with torch.no_grad():
                ROWS[name]()
        except Exception as error:  # a row that fails must not cost the others
            traceback.print_exc(file=sys.stdout)
            failed.append(f"{name}: {type(error).__name__}")
        free()
        folder = Path(os.environ.get("OUT", "."))
        (folder / "gpu.json").write_text(json.dumps(RESULT | {"failed": failed, "command": sys.argv[1:]}, indent=1))
    print("\n| what | value |\n|---|---|")
    for key, value in RESULT.items():
        print(f"| {key} | {value:,.4g} |" if isinstance(value, float) else f"| {key} | {value} |")
    for line in failed:
        print(f"| {line} | not measured |")


if __name__ == "__main__":
    main()

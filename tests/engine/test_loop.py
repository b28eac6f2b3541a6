"""Many at once through asyncio: everybody gets an own answer, who leaves frees everything, closing ends all."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import tiny
from by_hand import generate_reference
from tiercel.engine import loop
from tiercel.engine.engine import Engine
from tiercel.engine.loop import AsyncEngine
from tiercel.errors import Busy, RequestError
from tiercel.runtime.allocator import CachingAllocator
from tiercel.sampling.params import SamplingParams
from tiny import GREEDY, ids

LONG = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)  # seconds, also where a step takes 0.3 ms


def engine(net, **changes):
    return AsyncEngine(
        Engine(SimpleNamespace(network=net, tokenizer=None, max_length=8192), **({"cache_bytes": 1 << 26} | changes))
    )


async def tokens(stream):
    return [token async for update in stream for token in update.token_ids]


def test_twenty_at_once_are_answered_as_each_alone(net):
    async def main():
        many = engine(net)
        many.start()
        streams = [many.submit(ids(5 + 3 * i, seed=i), GREEDY) for i in range(20)]
        answers = await asyncio.gather(*map(tokens, streams))
        await many.close()
        return answers, many

    answers, many = asyncio.run(main())
    for i, answer in enumerate(answers):
        assert answer == generate_reference(net, ids(5 + 3 * i, seed=i), 12)
    assert many.engine.idle and not many.streams and many.engine.stats.kv_bytes == 0


def test_leaving_the_iterator_or_cancelling_the_task_frees_the_slot(net):
    async def main():
        many = engine(net)
        many.start()
        async for _ in many.submit(ids(20), LONG):
            break
        task = asyncio.create_task(tokens(many.submit(ids(30), LONG)))
        stream = many.submit(ids(40), LONG)
        await anext(stream)
        task.cancel()
        await stream.cancel()
        assert stream.request.sequences[0].state is None
        for _ in range(200):
            if many.engine.idle and not many.streams:
                break
            await asyncio.sleep(0.01)
        stats = many.engine.stats
        assert (stats.running, stats.waiting, stats.kv_bytes) == (0, 0, 0) and not many.streams
        await many.close()

    asyncio.run(main())


def test_closing_lets_what_runs_end_and_ends_what_takes_too_long(net):
    async def main():
        many = engine(net, slots=2)
        many.start()
        short, long = many.submit(ids(20), GREEDY), many.submit(ids(30), LONG)
        queued = many.submit(ids(30), LONG)
        read = [asyncio.create_task(collect(stream)) for stream in (short, long, queued)]
        await asyncio.sleep(0.05)
        await many.close(drain=0.1)
        with pytest.raises(Busy):
            many.submit(ids(3), GREEDY)
        return [updates[-1].finish_reason for updates in await asyncio.gather(*read)]

    async def collect(stream):
        return [update async for update in stream]

    first, second, third = asyncio.run(main())
    assert first in ("length", "abort") and second in ("length", "abort") and third == "abort"


def test_answers_can_be_ended_and_the_engine_closed_while_all_other_threads_are_busy(net):
    async def main():
        many, busy, loop = engine(net), threading.Event(), asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        work = loop.run_in_executor(None, busy.wait, 240)
        many.start()
        stream, other = many.submit(ids(20), LONG), many.submit(ids(20), LONG)
        await anext(stream), await anext(other)
        async with asyncio.timeout(120):
            await stream.cancel()
            assert stream.request.sequences[0].state is None and other.request.sequences[0].state is not None
            await many.close()
        assert many.engine.idle and await many.call(lambda: 3) == 3
        busy.set()
        await work

    asyncio.run(main())


def test_what_is_wrong_is_said_at_once(net):
    async def main():
        many = engine(net, slots=1, max_queue=2)
        many.start()
        with pytest.raises(RequestError, match="empty"):
            many.submit([], GREEDY)
        with pytest.raises(RequestError, match="vocabulary"):
            many.submit([999], GREEDY)
        with pytest.raises(Busy, match="queue") as busy:
            for _ in range(6):
                many.submit(ids(20), LONG)
        assert busy.value.retry_after >= 1
        await many.close()

    asyncio.run(main())


def test_a_failure_of_the_engine_itself_is_told_to_everybody(net, monkeypatch):
    async def main():
        many = engine(net)
        many.start()
        monkeypatch.setattr(many.engine.scheduler, "schedule", lambda boundary: 1 / 0)
        updates = [update async for update in many.submit(ids(20), LONG)]
        monkeypatch.undo()
        assert updates[-1].finish_reason == "error" and "failed" in str(updates[-1].error)
        assert await tokens(many.submit(ids(20), GREEDY)) == generate_reference(net, ids(20), 12)
        await many.close()

    asyncio.run(main())


def test_work_between_two_steps(net):
    async def main():
        many = engine(net)
        many.start()
        stream = many.submit(ids(20), GREEDY)
        assert await many.call(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            await many.call(lambda: 1 / 0)
        assert len(await tokens(stream)) == 12 and many.stats.generated_tokens == 12
        await many.close()

    asyncio.run(main())


def test_a_reader_that_is_far_behind_is_cut_off_and_the_log_says_so(net, monkeypatch, caplog):
    monkeypatch.setattr("tiercel.engine.loop.MAX_UNREAD_UPDATES", 20)

    async def main():
        many = engine(net)
        many.start()
        stream = many.submit(ids(20), LONG)
        while many.streams:  # nobody reads it
            await asyncio.sleep(0.01)
        left = [update async for update in stream]
        assert len(left) <= 21 and left[-1].finish_reason == "error" and "not read" in str(left[-1].error)
        for _ in range(200):
            if many.engine.idle:
                break
            await asyncio.sleep(0.01)
        assert many.engine.idle and many.engine.stats.kv_bytes == 0
        await many.close()

    asyncio.run(main())
    assert any("updates behind" in record.message for record in caplog.records)


def test_an_engine_that_rests_sees_to_memory_and_still_answers_at_once(monkeypatch):
    monkeypatch.setattr(CachingAllocator, "SMALL_BLOCK_BYTES", 1)
    monkeypatch.setattr(CachingAllocator, "PREFAULT_BYTES", 1 << 14)
    monkeypatch.setattr(loop, "IDLE_SECONDS", 0.01)
    net = tiny.network()

    async def main():
        many = engine(net)
        many.start()
        while many.engine.runner.allocator.nbytes < 1 << 18:
            await asyncio.sleep(0.001)
        assert not many.engine.stats.running
        answer = await asyncio.wait_for(tokens(many.submit(ids(9), GREEDY)), 240)
        for _ in range(40_000):
            await asyncio.sleep(0.005)
            if many.engine.runner.allocator.nbytes >= sum(many.engine.memory_targets):
                break
        assert many.engine.runner.allocator.nbytes >= sum(many.engine.memory_targets)
        await many.close()
        return answer

    assert asyncio.run(main()) == generate_reference(net, ids(9), 12)

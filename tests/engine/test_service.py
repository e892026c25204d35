"""The engine behind an event loop: streams, withdrawals, back-pressure, weights replaced under load, an orderly end."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rorqual.engine import Engine, EngineConfig
from rorqual.engine.service import Busy, Closing, EngineService
from rorqual.errors import UserError
from rorqual.model.transformer import Transformer
from rorqual.policy import SamplingParams, StopReason
from tests.engine.test_engine import CONFIG, GREEDY, prompts


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, seed=3)


def test_streams_give_the_same_tokens_as_offline_and_each_as_it_comes(model):
    offline = Engine(model).generate(prompts(), GREEDY)

    async def stream(service, prompt):
        handle = service.submit(prompt, GREEDY)
        tokens = [sampled.token async for sampled in handle]
        return tokens, await handle.completion()

    async def main():
        async with EngineService(Engine(model)) as service:
            return await asyncio.gather(*(stream(service, prompt) for prompt in prompts()))

    for (tokens, done), expected in zip(asyncio.run(main()), offline, strict=True):
        assert tuple(tokens) == done.tokens == expected.tokens
        assert np.array_equal(done.logprobs, expected.logprobs)


def test_a_caller_that_goes_away_frees_its_request(model):
    async def main():
        service = EngineService(Engine(model))
        task = asyncio.create_task(service.complete([1, 2, 3], SamplingParams(max_tokens=400, temperature=0)))
        await asyncio.sleep(0.2)
        task.cancel()
        handle = service.submit([4, 5], SamplingParams(max_tokens=400, temperature=0))
        async for _ in handle:
            handle.abort()
        assert (await handle.completion()).stop_reason == StopReason.ABORTED
        with pytest.raises(asyncio.CancelledError):
            await task
        await service.close()
        return service.engine

    engine = asyncio.run(main())
    assert engine.pool.num_held == 0 and engine.counters.sampled_tokens < 400


def test_a_full_queue_is_said_and_a_wrong_request_harms_only_itself(model):
    async def main():
        async with EngineService(Engine(model, EngineConfig(max_running=1)), max_waiting=2) as service:
            handles = [service.submit([1, i], GREEDY) for i in range(2)]
            with pytest.raises(Busy) as caught:
                service.submit([1], GREEDY)
            assert caught.value.retry_after_s >= 1
            done = [await handle.completion() for handle in handles]
            with pytest.raises(UserError, match="expected ids"):
                await service.complete([1000], GREEDY)
            return done

    assert [len(done.tokens) for done in asyncio.run(main())] == [12, 12]


def test_weights_replaced_under_load_never_mix_inside_a_completion():
    other = Transformer(CONFIG, seed=8)
    before = [done.tokens for done in Engine(Transformer(CONFIG, seed=3)).generate(prompts(8), GREEDY)]
    after = [done.tokens for done in Engine(other).generate(prompts(8), GREEDY)]

    async def main():
        async with EngineService(Engine(Transformer(CONFIG, seed=3), EngineConfig(max_running=3))) as service:
            tasks = [asyncio.create_task(service.complete(prompt, GREEDY)) for prompt in prompts(8)]
            await asyncio.sleep(0.1)
            assert await service.update_weights(other.state_dict().items()) == 1
            return await asyncio.gather(*tasks)

    done = asyncio.run(main())
    versions = [set(each.policy_versions.tolist()) for each in done]
    assert all(len(each) == 1 for each in versions)
    for each, old, new in zip(done, before, after, strict=True):
        assert each.tokens == (new if each.policy_version else old)


def test_close_drains_or_aborts_and_then_takes_nothing_more(model):
    async def main(drain):
        service = EngineService(Engine(model))
        task = asyncio.create_task(service.complete([1, 2], SamplingParams(max_tokens=60, temperature=0)))
        await asyncio.sleep(0.05)
        await service.close(drain=drain)
        with pytest.raises(Closing):
            service.submit([1], GREEDY)
        return await task

    assert len(asyncio.run(main(True)).tokens) == 60
    assert asyncio.run(main(False)).stop_reason == StopReason.ABORTED


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(model, monkeypatch):
    async def main():
        async with EngineService(Engine(model)) as service:
            run, failures = service.engine.runner.run, [MemoryError("no memory")]
            monkeypatch.setattr(service.engine.runner, "run", lambda work: run(work) if not failures else _raise(failures.pop()))
            with pytest.raises(MemoryError):
                await service.complete([1, 2], GREEDY)
            assert service.engine.pool.num_held == 0
            return await service.complete([1, 2], GREEDY)

    assert len(asyncio.run(main()).tokens) == 12


def _raise(error):
    raise error

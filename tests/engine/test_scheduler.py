"""Who is computed next: first come first served, but for those whose prompt another is computing already."""

from __future__ import annotations

from rorqual.engine.blocks import BlockPool
from rorqual.engine.request import Request
from rorqual.engine.scheduler import Scheduler, SchedulerConfig
from rorqual.policy import SamplingParams

COMMON = list(range(100, 116))


def queued(prompts, num_blocks=64, **limits):
    scheduler = Scheduler(SchedulerConfig(**limits), BlockPool(num_blocks, 4))
    requests = [Request(i, tuple(prompt), SamplingParams(), seed=i) for i, prompt in enumerate(prompts)]
    for request in requests:
        scheduler.add(request)
    return scheduler, requests


def step(scheduler):
    """Carry a step out: {request: tokens computed}."""
    work = scheduler.schedule()
    for item in work:
        scheduler.computed(item.request, item.start + item.count)
        if item.is_last:
            item.request.tokens.append(7)
    return {item.request.number: item.count for item in work}


def test_one_whose_prompt_is_under_way_waits_lets_others_pass_and_then_shares_its_blocks():
    scheduler, _ = queued([[*COMMON, 1, 2, 3], [*COMMON, 4, 5], [9] * 10, [*COMMON, 6]])
    assert step(scheduler) == {0: 19, 2: 10}
    assert step(scheduler) == {0: 1, 2: 1, 1: 2, 3: 1}, "only what is their own"
    assert scheduler.pool.num_held == 5 + 1 + 1 + 3


def test_it_waits_no_longer_than_for_the_blocks_that_are_common():
    long = [*COMMON, *range(200, 260)]
    scheduler, _ = queued([long, [*COMMON, 1]], max_step_tokens=20)
    assert step(scheduler) == {0: 20}
    assert step(scheduler) == {0: 20}, "the step's budget is spent on what runs already"
    scheduler.config = SchedulerConfig(max_step_tokens=40)
    assert step(scheduler)[1] == 1, "admitted before the long prompt is through"


def test_it_is_computed_on_its_own_where_the_one_it_waits_for_goes_away():
    scheduler, (first, second) = queued([[*COMMON, 1], [*COMMON, 2]])
    scheduler.schedule()
    assert list(scheduler.waiting) == [second]
    scheduler.finish(first)  # withdrawn before anything of it was computed
    assert step(scheduler) == {1: 17}


def test_nobody_overtakes_one_that_waits_for_room():
    scheduler, _ = queued([[1] * 12, [2] * 24, [3] * 4], num_blocks=7)
    assert step(scheduler) == {0: 12}, "the second does not fit beside the first, and the third came after it"

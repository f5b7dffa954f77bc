"""Jobs, the queue and the engine, without HTTP."""

import threading

import pytest
import torch
from servers.images import SlowDraw, engine_of, wait_until

from dalle.best_of_n import Request
from dalle.editing.regions import Region
from dalle.sampling import Sampling
from dalle.server.queueing.batch import MAX_TOGETHER, Work, draw, fits
from dalle.server.queueing.jobs import ClosedError, Job, LateError, Previews, Queue, QueueFullError, Rows
from dvae.images import to_image, to_tensor

CUBE, SPHERE = "a red cube on a blue cube", "a green sphere left of a red cube"


def work(caption=CUBE, n=4, keep=2, seed=0, rank="clip", source=None, **settings):
    return Work(caption=caption, n=n, keep=keep, sampling=Sampling(seed=seed, **settings), rank=rank, source=source)


def job(*arguments, owner="a", timeout_s=60.0, previews=None, **options):
    return Job(work(*arguments, **options), owner=owner, timeout_s=timeout_s, previews=previews)


class Blind:
    """Watches, and wants everything."""

    def begun(self, work, judge):
        pass

    def sampled(self, tokens):
        return ()

    def judged(self, work):
        pass


def assert_same(found, expected):
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.candidates == expected.candidates


@pytest.fixture(scope="module")
def region(pipe):
    is_new = torch.zeros(16, 16, dtype=torch.bool)
    is_new[5:11, 6:14] = True
    return Region(pixels=to_tensor(to_image(pipe.decode(torch.arange(16)[None])[0])), is_new=is_new)


@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0}, {"temperature": 0.5, "top_k": 8}])
def test_works_drawn_together_are_those_drawn_alone(pipe, settings):
    works = [work(CUBE, 5, 2, seed=1, **settings), work(SPHERE, 1, 1, seed=2, **settings)]
    works += [work(CUBE, 3, 3, seed=7, rank="likelihood", **settings)]
    together = draw(pipe, works, Blind())
    for one in works:
        request = Request(caption=one.caption, n=one.n, keep=one.keep)
        assert_same(together[one], pipe.best(request, one.sampling, rank=one.rank))


@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0}, {"temperature": 0.5, "top_k": 8, "rank": "both"}])
def test_an_edit_is_that_of_the_pipeline(pipe, region, settings):
    one = work(CUBE, 6, 3, seed=1, source=region, **settings)
    found = draw(pipe, [one], Blind())[one]
    chosen = pipe.defaults.updated(**settings)
    mask = region.is_new.numpy()
    expected = pipe.edit(region.original(), mask, CUBE, n=6, keep=3, seed=1, settings=chosen)
    assert_same(found, expected)
    assert (found.n_unknown, found.rank) == (6, chosen.rank)


def test_an_edit_shows_what_is_kept_while_it_grows(pipe, region):
    engine = engine_of(pipe)
    edit = job(n=5, source=region)
    edit.previews = Previews(rows=frozenset({2, 3}), growing=3)
    seen = []
    edit.listen(lambda event: seen.append(event))
    engine.queue.submit(edit)
    wait_until(lambda: edit.has_ended)
    tops = [(event.n_rows, event.tops) for event in seen if isinstance(event, Rows) and event.tops is not None]
    assert {(n_rows, len(top)) for n_rows, top in tops} >= {(2, 1), (3, 1)}
    for n_rows, top in tops:
        assert top.shape[2] == 4 * n_rows
        kept = ~region.is_new[: top.shape[2]]
        assert torch.equal(top[:, :, kept], region.pixels[:, : top.shape[2]][:, kept].expand(len(top), -1, -1))
    engine.queue.close()


def test_an_edit_ends_within_a_token_when_it_is_cancelled_and_does_not_outlast_its_time(pipe, region):
    slow = SlowDraw(token_s=0.2)
    engine = engine_of(pipe, slow)
    doomed, late = job(source=region), job(seed=1, source=region)
    late.timeout_s = 0.9
    engine.queue.submit(doomed)
    wait_until(lambda: doomed.state == "running")
    engine.queue.cancel(doomed)
    engine.queue.submit(late)
    wait_until(lambda: late.has_ended and engine.queue.is_idle)
    assert (doomed.state, late.state, type(late.error).__name__) == ("cancelled", "failed", "LateError")
    assert slow.ended == 2
    engine.queue.close()


def test_a_work_too_large_for_the_memory_is_drawn_in_batches(pipe, monkeypatch):
    whole = pipe.best(Request(caption=CUBE, n=7, keep=2), Sampling())
    monkeypatch.setattr(pipe, "memory", 1)
    assert pipe.default_batch_size(7) == 1
    assert not fits(pipe, [work(n=7), work(n=7, seed=1)])
    found = draw(pipe, [work(n=7)], Blind())[work(n=7)]
    assert torch.equal(found.tokens, whole.tokens)
    assert_same(found, pipe.best(Request(caption=CUBE, n=7, keep=2), Sampling()))


def test_only_equal_settings_go_together_and_edits_are_alone(pipe, region):
    assert work(seed=1).goes_with(work(SPHERE, n=9, seed=2, rank="likelihood"))
    assert not work().goes_with(work(temperature=0.5))
    assert not work().goes_with(work(source=region))
    assert not work(source=region).goes_with(work(source=region, seed=1))
    assert fits(pipe, [work(n=MAX_TOGETHER // 2), work(n=MAX_TOGETHER // 2, seed=1)])
    assert not fits(pipe, [work(n=MAX_TOGETHER // 2), work(n=MAX_TOGETHER // 2 + 1, seed=1)])


def test_jobs_that_wait_share_a_batch_and_equal_ones_a_work(pipe):
    slow = SlowDraw(token_s=60)
    engine = engine_of(pipe, slow)
    before = job(top_p=0.5)
    engine.queue.submit(before)
    wait_until(lambda: before.state == "running")
    jobs = [job(CUBE, seed=1), job(SPHERE, seed=2), job(CUBE, seed=1), job(CUBE, seed=1, temperature=0.5)]
    for one in jobs:
        engine.queue.submit(one)
    slow.go.set()
    wait_until(lambda: all(one.has_ended for one in jobs))
    assert [one.state for one in jobs] == ["done"] * 4
    assert slow.drawn == [(before.work,), (jobs[0].work, jobs[1].work), (jobs[3].work,)]
    assert jobs[0].result is jobs[2].result
    assert_same(jobs[1].result, pipe.best(Request(caption=SPHERE, n=4, keep=2), Sampling(seed=2)))
    engine.queue.close()


def test_a_cancelled_job_ends_the_sampling_within_a_token(pipe):
    slow = SlowDraw(token_s=0.2)
    engine = engine_of(pipe, slow)
    doomed = job()
    engine.queue.submit(doomed)
    wait_until(lambda: doomed.state == "running")
    engine.queue.cancel(doomed)
    assert doomed.state == "cancelled"
    wait_until(lambda: engine.queue.is_idle)
    assert slow.ended == 1
    slow.token_s = 0.0
    after = job(seed=3)
    engine.queue.submit(after)
    wait_until(lambda: after.has_ended)
    assert_same(after.result, pipe.best(Request(caption=CUBE, n=4, keep=2), Sampling(seed=3)))
    engine.queue.close()


def test_a_job_cancelled_in_a_shared_batch_leaves_the_other_as_it_was(pipe):
    engine = engine_of(pipe, SlowDraw(token_s=0.02))
    doomed, other = job(CUBE, n=6, seed=1), job(SPHERE, n=5, seed=2)
    doomed.previews = Previews(rows=frozenset({1}))
    doomed.listen(lambda event: isinstance(event, Rows) and engine.queue.cancel(doomed))
    for one in (doomed, other):
        engine.queue.submit(one)
    wait_until(lambda: other.has_ended)
    assert doomed.state == "cancelled"
    assert doomed.result is None
    assert_same(other.result, pipe.best(Request(caption=SPHERE, n=5, keep=2), Sampling(seed=2)))
    engine.queue.close()


def test_a_job_that_waits_is_cancelled_without_being_drawn(pipe):
    slow = SlowDraw(token_s=60)
    engine = engine_of(pipe, slow)
    first, second = job(seed=1), job(seed=2, temperature=0.5)
    for one in (first, second):
        engine.queue.submit(one)
    engine.queue.cancel(second)
    slow.go.set()
    wait_until(lambda: first.has_ended)
    engine.queue.close()
    engine.join()
    assert slow.drawn == [(first.work,)]


def test_a_job_cancelled_before_it_is_taken_does_not_end_the_engine(pipe):
    engine = engine_of(pipe)
    for seed in range(5):
        doomed = job(seed=seed)
        engine.queue.submit(doomed)
        engine.queue.cancel(doomed)
    after = job()
    engine.queue.submit(after)
    wait_until(lambda: after.has_ended)
    assert after.state == "done"
    engine.queue.close()


def test_a_listener_that_fails_does_not_end_the_engine(pipe):
    engine = engine_of(pipe)
    watched, after = job(), job(seed=1)

    def fail(event):
        raise KeyError("no")

    watched.listen(fail)
    for one in (watched, after):
        engine.queue.submit(one)
        wait_until(lambda one=one: one.has_ended)
    assert [watched.state, after.state] == ["done", "done"]
    engine.queue.close()


def test_the_queue_is_bounded_by_jobs_and_by_candidates():
    queue = Queue(max_jobs=3, max_candidates=100)
    queue.submit(job(n=90))
    with pytest.raises(QueueFullError) as full:
        queue.submit(job(n=11))
    assert 1 <= full.value.retry_after_s <= 60
    queue.submit(job(n=5))
    queue.submit(job(n=5))
    with pytest.raises(QueueFullError):
        queue.submit(job(n=2))
    large = Queue(max_jobs=3, max_candidates=100)
    large.submit(job(n=500))  # alone it may be larger
    assert large.n_candidates == 500


def test_owners_are_served_in_turn_and_each_in_order():
    queue = Queue(max_jobs=32, max_candidates=4096)
    of_a = [job(owner="a", seed=seed) for seed in range(3)]
    of_b = [job(owner="b", seed=seed) for seed in range(3, 5)]
    for one in [*of_a, *of_b]:
        queue.submit(one)
    assert [queue.before(one) for one in of_a] == [0, 2, 4]
    order = []
    while queue.n_jobs:
        order += queue.take(lambda works: False)
    assert order == [of_a[0], of_b[0], of_a[1], of_b[1], of_a[2]]


def test_late_jobs_fail_whether_they_run_or_wait(pipe):
    engine = engine_of(pipe, SlowDraw(token_s=0.2))
    running, waiting = job(seed=1, timeout_s=1.5), job(seed=2, temperature=0.5, timeout_s=0.5)
    engine.queue.submit(running)
    wait_until(lambda: running.state == "running")
    engine.queue.submit(waiting)
    wait_until(lambda: running.has_ended and waiting.has_ended)
    assert [type(one.error) for one in (running, waiting)] == [LateError, LateError]
    assert [one.error.was_queued for one in (running, waiting)] == [False, True]
    wait_until(lambda: engine.queue.is_idle)
    engine.queue.close()


def test_a_work_that_fails_takes_no_other_along(pipe):
    def failing(pipe, works, watch):
        if any(one.caption == SPHERE for one in works):
            raise RuntimeError("no")
        return draw(pipe, works, watch)

    engine = engine_of(pipe, failing)
    bad, good = job(SPHERE), job(CUBE)
    for one in (bad, good):
        engine.queue.submit(one)
    wait_until(lambda: bad.has_ended and good.has_ended)
    assert (bad.state, str(bad.error), good.state) == ("failed", "no", "done")
    engine.queue.close()


def test_ending_tells_every_job_and_takes_no_more(pipe):
    engine = engine_of(pipe, SlowDraw(token_s=0.05))
    jobs = [job(seed=1), job(seed=2, temperature=0.5)]
    told = threading.Event()
    jobs[1].listen(lambda event: told.set())
    for one in jobs:
        engine.queue.submit(one)
    engine.queue.end_all()
    assert [type(one.error) for one in jobs] == [ClosedError, ClosedError]
    assert told.is_set()
    with pytest.raises(ClosedError):
        engine.queue.submit(job())
    engine.join(60)
    late = []
    jobs[0].listen(late.append)
    assert len(late) == 1  # who listens after the end is told at once


def test_rows_that_are_shown_are_those_of_the_result(pipe):
    engine = engine_of(pipe)
    shown = []
    one = job(n=1, keep=1, previews=Previews(rows=frozenset({2, 3})))
    one.listen(lambda event: isinstance(event, Rows) and shown.append(event))
    engine.queue.submit(one)
    wait_until(lambda: one.has_ended)
    assert [event.n_rows for event in shown] == [2, 3]
    for event in shown:
        top = pipe.decode(one.result.tokens[:, : 4 * event.n_rows])
        assert torch.equal(event.tops, top)
    many = job(n=6, keep=1, previews=Previews(growing=5))
    shown.clear()
    many.listen(lambda event: isinstance(event, Rows) and shown.append(event))
    engine.queue.submit(many)
    wait_until(lambda: many.has_ended)
    assert [event.n_rows for event in shown] == [1, 2, 3, 4]
    assert shown[0].tops.shape == (5, 3, 4, 16)
    assert list(shown[-1].candidates) == [0, 1, 2, 3, 4]
    engine.queue.close()

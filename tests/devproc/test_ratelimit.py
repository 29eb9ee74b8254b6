"""Token buckets on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from devproc.backends.ratelimit import Bucket, RateLimit

S = 10**9


def spend(limit: Bucket | RateLimit, now_ns: int, until_ns: int, units: int) -> int:
    """How many takes of `units` go through in [now_ns, until_ns), each as early as it may."""
    takes = 0
    while (now_ns := max(now_ns, limit.ready_ns)) < until_ns:
        limit.take(now_ns, units)
        takes += 1
    return takes


def test_a_rate_of_zero_is_no_limit() -> None:
    bucket = Bucket(0)
    for _ in range(1000):
        bucket.take(5 * S, 1 << 40)
    assert bucket.ready_ns <= 5 * S


def test_an_idle_bucket_gives_a_tenth_of_a_second_at_once() -> None:
    bucket = Bucket(1000)
    taken = 0
    while bucket.ready_ns <= 7 * S:
        bucket.take(7 * S, 1)
        taken += 1
    assert taken == 101  # the one that empties it included


def test_what_was_not_used_is_not_saved_up() -> None:
    bucket = Bucket(1000)
    bucket.take(0, 1)
    assert spend(bucket, 3600 * S, 3600 * S + 1, 1) == 101


def test_a_take_larger_than_the_bucket_passes_and_is_paid_for() -> None:
    bucket = Bucket(1000)
    bucket.take(0, 5000)
    assert bucket.ready_ns == 5 * S - S // 10


@settings(max_examples=50, deadline=None)
@given(rate=st.integers(1, 3000), units=st.integers(1, 500), start_s=st.integers(0, 10**6))
def test_no_interval_sees_more_than_rate_and_burst_and_one_take(rate: int, units: int, start_s: int) -> None:
    bucket = Bucket(rate)
    taken = units * spend(bucket, start_s * S, (start_s + 3) * S, units)
    assert rate * 3 - units <= taken <= rate * 3.1 + units + 1


def test_bytes_and_operations_are_limited_each() -> None:
    by_bytes, by_operations = RateLimit(1 << 20, 0), RateLimit(0, 100)
    assert spend(by_bytes, S, 11 * S, 65536) == 162  # 16 a second for 10.1 s
    assert spend(by_operations, S, 11 * S, 65536) == 1010


def test_the_slower_of_two_limits_decides() -> None:
    limit = RateLimit(1 << 20, 100)
    limit.take(0, 1 << 20)
    assert limit.ready_ns == S - S // 10

"""The window's arithmetic, a line each."""

from __future__ import annotations

import pytest

from myserve.sdk.concurrency.aimd import AIMD, Observed

LAW = AIMD(min_window=2, max_window=100, target=0.5)


@pytest.mark.parametrize(
    ("window", "seen", "gentle", "after"),
    [
        (16, Observed(0.0, peak_in_flight=16), False, 20),  # an empty queue: a quarter more
        (16, Observed(0.25, peak_in_flight=16), False, 18),  # half way to the target: half of that
        (16, Observed(0.49, peak_in_flight=16), False, 17),  # still at least one
        (16, Observed(0.5, peak_in_flight=16), False, 16),  # on target: stays
        (16, Observed(0.51, peak_in_flight=16), False, 8),  # above: halves
        (44, Observed(2.0, 4.0, peak_in_flight=44), True, 33),  # inside a step: what queues too long goes, …
        (44, Observed(2.0, 400.0, peak_in_flight=44), True, 43),  # … which is little where samples take long
        (44, Observed(90.0, 4.0, peak_in_flight=44), True, 22),  # … and a half at most
        (16, Observed(9.0, peak_in_flight=16), True, 11),  # the time of service untold: 30 per cent at most
        (16, Observed(1.0, peak_in_flight=16), True, 13),  # less where the excess is less
        (16, Observed(0.51, peak_in_flight=16), True, 15),  # 5 per cent at least
        (16, Observed(0.0, peak_in_flight=7), False, 16),  # a window that was not filled says nothing
        (16, Observed(None, peak_in_flight=16), False, 16),  # a server that tells nothing
        (16, Observed(0.0, refused=True, peak_in_flight=16), False, 8),  # a 429
        (16, Observed(0.0, kv_usage=0.97, peak_in_flight=16), False, 8),  # the KV cache is full
        (3, Observed(9.0), False, 2),  # never under the minimum
        (90, Observed(0.0, peak_in_flight=90), False, 100),  # nor over the maximum
    ],
)
def test_next_window(window, seen, gentle, after):
    assert LAW.next_window(window, seen, gentle=gentle) == after

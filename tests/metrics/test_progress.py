from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mmscale.engine.step_clock import peak_memory
from mmscale.metrics.format import format_count, format_seconds
from mmscale.metrics.run_log import ProgressLine, Rates, StepMeter


class Clock:
    """A fake clock."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 0.99))
def test_moving_average_equals_its_closed_form(values: list[float], smoothing: float) -> None:
    clock = Clock()
    meter = StepMeter(0, len(values), smoothing, clock)
    for value in values:
        clock.now += 1.0  # Steps of one second each: tokens per second are the average of the tokens.
        meter.finish_step(value, 0)
    weights = [smoothing ** (len(values) - 1 - i) for i in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert meter.rates().tokens_per_second == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_step_is_split_into_waiting_and_the_rest() -> None:
    clock = Clock()
    meter = StepMeter(start_step=10, total_steps=14, smoothing=0.0, clock=clock)
    with meter.waiting_for_data():
        clock.now += 0.5
    clock.now += 1.5
    timing = meter.finish_step(num_tokens=400, num_samples=20)
    assert (timing.seconds, timing.data_wait_seconds) == (2.0, 0.5)
    rates = meter.rates()
    assert rates == Rates(tokens_per_second=200.0, samples_per_second=10.0, data_wait_share=0.25, eta_seconds=6.0)


def test_waiting_counts_even_if_the_loader_raises() -> None:
    clock = Clock()
    meter = StepMeter(0, 1, clock=clock)

    def fetch() -> None:
        with meter.waiting_for_data():
            clock.now += 3
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fetch()
    assert meter.finish_step(1, 1).data_wait_seconds == 3


def test_a_pause_counts_for_no_step() -> None:
    clock = Clock()
    meter = StepMeter(0, 2, smoothing=0.0, clock=clock)
    clock.now += 1
    meter.finish_step(1, 1)
    clock.now += 60  # A checkpoint.
    meter.pause()
    clock.now += 2
    assert meter.finish_step(1, 1).seconds == 2
    assert meter.rates().eta_seconds == 0


def test_rates_weigh_steps_by_their_length() -> None:
    clock = Clock()
    meter = StepMeter(0, 10, smoothing=0.999999, clock=clock)
    for seconds, tokens in ((1.0, 100), (9.0, 100)):
        clock.now += seconds
        meter.finish_step(tokens, 1)
    assert meter.rates().tokens_per_second == pytest.approx(20.0, rel=1e-3)


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory().rss_bytes
    held = bytearray(before + (64 << 20))
    held[::4096] = b"\x01" * len(held[::4096])
    assert peak_memory().rss_bytes >= before + (32 << 20)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (999.9, "1k"), (12345, "12.3k"), (4.56e6, "4.56M"), (7e9, "7G")]
)
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m"), (3 * 86400 + 4 * 3600, "3d04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_without_a_terminal_there_is_a_plain_line_now_and_then_and_at_the_end() -> None:
    out, clock = io.StringIO(), Clock()
    line = ProgressLine(Console(file=out, width=60), 0, 5, plain_line_seconds=10, clock=clock)
    rates = Rates(12_300, 45, 0.031, 187)
    for step in range(1, 6):
        clock.now += 4
        if line.is_due(step):
            line.update(step, 2.5, rates, "align")
    line.close()
    lines = out.getvalue().splitlines()
    assert [text.split(" · ")[1] for text in lines] == ["step 1/5", "step 4/5", "step 5/5"]
    assert lines[0] == "align · step 1/5 · loss 2.5000 · 12.3k tokens/s · 45 samples/s · wait 3% · ETA 3m07s"


def test_a_terminal_gets_a_bar_with_the_same_values() -> None:
    out = io.StringIO()
    line = ProgressLine(Console(file=out, force_terminal=True, width=140), 2, 5, plain_line_seconds=10)
    assert line.is_due(3)
    line.update(3, 2.5, Rates(12_300, 45, 0.031, 187), "align")
    line.print_line("[saved] step-00000003")
    line.close()
    assert "3/5" in out.getvalue()
    assert "12.3k tokens/s" in out.getvalue()
    assert "[saved] step-00000003" in out.getvalue()

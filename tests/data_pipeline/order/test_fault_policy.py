"""The fault policy: the treatment of each kind of fault, the limits, and counters that survive a resume."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.errors import (
    DataConfigError,
    FaultKind,
    ManifestError,
    SampleError,
    ShardError,
    StateError,
    TooManyFaultsError,
)
from data_pipeline.order.fault_policy import Fault, FaultConfig, FaultPolicy

pytestmark = pytest.mark.fault


@dataclass
class NoKnownFaults:
    """A data set without known faults, which records faults and successes."""

    calls: list[object] = field(default_factory=list)

    def recall(self, sample: int) -> Fault | None:
        return None

    def locate(self, sample: int) -> tuple[str, str]:
        return "shard.tar", "key"

    def offset(self, sample: int) -> int | None:
        return None

    def record_shard_failure(self, sample: int, error: Exception) -> Fault:
        return Fault(SampleError(str(error), kind=FaultKind.SHARD), counts=False)

    def remember(self, sample: int, error: SampleError) -> None:
        self.calls.append(error)

    def record_success(self, sample: int) -> None:
        self.calls.append("good")


def attempt(policy: FaultPolicy, error: BaseException | None, known: NoKnownFaults | None = None) -> object:
    def make() -> str:
        if error is not None:
            raise error
        return "document"

    return policy.attempt(make, known or NoKnownFaults(), 0)


def bad(kind: FaultKind = FaultKind.DECODE) -> SampleError:
    return SampleError("broken", kind=kind, shard="s.tar", key="k")


OF_SAMPLES = [kind for kind in FaultKind if kind not in (FaultKind.SHARD, FaultKind.EXCLUDED)]


@pytest.mark.parametrize("kind", OF_SAMPLES)
def test_each_kind_follows_its_own_line_or_the_common_one(kind: FaultKind) -> None:
    others = [other for other in OF_SAMPLES if other is not kind]
    skipping = FaultPolicy(FaultConfig.model_validate({"on_error": "fail", kind.value: "skip"}))
    assert isinstance(attempt(skipping, bad(kind)), Fault)
    failing = FaultPolicy(FaultConfig.model_validate({"on_error": "skip", kind.value: "fail"}))
    for other in others:
        with pytest.raises(SampleError):
            attempt(skipping, bad(other))
        assert isinstance(attempt(failing, bad(other)), Fault)
    with pytest.raises(SampleError):
        attempt(failing, bad(kind))


def test_an_unforeseen_exception_is_a_fault_with_place_and_type() -> None:
    fault = attempt(FaultPolicy(FaultConfig()), ZeroDivisionError("by nought"))
    assert isinstance(fault, Fault)
    error = fault.error
    assert (error.kind, error.shard, error.key) == (FaultKind.UNEXPECTED, "shard.tar", "key")
    assert error.reason == "ZeroDivisionError: by nought"


NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize("error", [DataConfigError("no"), MemoryError(), NO_MEMORY, KeyboardInterrupt()])
def test_what_is_not_about_a_sample_or_a_shard_is_never_skipped(error: BaseException) -> None:
    with pytest.raises(type(error)):
        attempt(FaultPolicy(FaultConfig(shard="skip")), error)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ShardError("gone"), ManifestError("stale")])
def test_a_lost_shard_ends_the_run_unless_it_is_to_be_skipped_and_then_counts_for_no_limit(error: Exception) -> None:
    with pytest.raises(type(error)):
        attempt(FaultPolicy(FaultConfig(on_error="skip")), error)  # type: ignore[arg-type]
    policy = FaultPolicy(FaultConfig(on_error="fail", shard="skip", max_consecutive=1))  # type: ignore[arg-type]
    fault = attempt(policy, error)
    assert isinstance(fault, Fault)
    assert fault.error.kind is FaultKind.SHARD
    assert policy.state() == (0,)


def test_only_faults_of_the_bytes_themselves_are_kept_in_quarantine() -> None:
    for kind in OF_SAMPLES:
        known = NoKnownFaults()
        attempt(FaultPolicy(FaultConfig.model_validate({kind.value: "quarantine"})), bad(kind), known)
        assert bool(known.calls) == (kind in (FaultKind.CHECKSUM, FaultKind.DECODE)), kind
    known = NoKnownFaults()
    attempt(FaultPolicy(FaultConfig()), bad(), known)
    assert known.calls == []


def gives_up(config: FaultConfig, faults: list[bool], resume_at: int | None = None) -> int | None:
    """Return the number of the sample at which a policy gives up, with a resume before sample ``resume_at``."""
    policy = FaultPolicy(config)
    for number, is_bad in enumerate(faults):
        if number == resume_at:
            policy = FaultPolicy(config, policy.state())
        try:
            attempt(policy, bad() if is_bad else None)
        except TooManyFaultsError:
            return number
    return None


def counted(config: FaultConfig, faults: list[bool]) -> int | None:
    """As ``gives_up``, computed by counting over the whole list."""
    for end in range(1, len(faults) + 1):
        row = faults[max(0, end - config.max_consecutive) : end]
        window = faults[max(0, end - config.share_window) : end]
        if len(row) == config.max_consecutive and all(row):
            return end - 1
        if faults[end - 1] and sum(window) > config.max_share * config.share_window:
            return end - 1
    return None


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 6),
    st.floats(0.05, 1),
    st.integers(1, 20),
    st.integers(0, 60),
)
def test_limits_are_those_of_a_plain_count_resumed_or_not(
    faults: list[bool], row: int, share: float, window: int, resume_at: int
) -> None:
    config = FaultConfig(max_consecutive=row, max_share=share, share_window=window)
    expected = counted(config, faults)
    assert gives_up(config, faults) == expected
    assert gives_up(config, faults, resume_at) == expected


def test_the_state_is_empty_after_good_samples_and_small_after_bad_ones() -> None:
    policy = FaultPolicy(FaultConfig(share_window=4, max_share=1))
    assert policy.state() == (0,)
    for error in (bad(), None, bad(), bad()):
        attempt(policy, error)
    assert policy.state() == (2, 0, 1, 3)
    for _ in range(4):
        attempt(policy, None)
    assert policy.state() == (0,)


@pytest.mark.parametrize("state", [(-1,), (0, 3, 3), (0, 2, 1), (0, -1)])
def test_a_damaged_state_is_refused(state: tuple[int, ...]) -> None:
    with pytest.raises(StateError):
        FaultPolicy(FaultConfig(), state)


def test_the_message_names_the_setting_and_the_last_fault() -> None:
    policy = FaultPolicy(FaultConfig(max_share=0.5, share_window=4))
    attempt(policy, bad())
    attempt(policy, bad())
    with pytest.raises(TooManyFaultsError, match=r"3 of the last 4 .*data\.faults\.max_share=0\.5.* s\.tar/k: broken"):
        attempt(policy, bad())


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ValidationError):
        FaultConfig.model_validate({"decode": "ignore"})


def test_a_reason_that_quotes_the_data_is_cut() -> None:
    assert len(SampleError("x" * 10**6).reason) == 500

from __future__ import annotations

import json
from datetime import timedelta
from random import Random
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgebus._runtime.outcome import (
    MAX_MESSAGE_CHARS,
    MAX_TRACEBACK_CHARS,
    DeadLetter,
    Failure,
    Reschedule,
    clean,
    decide,
    describe,
)
from pgebus.retry import MAX_DELAY, Reject, Retry, RetryPolicy, Snooze

POLICY = RetryPolicy(max_attempts=3, first=timedelta(seconds=1), ceiling=timedelta(minutes=1))

# Hypothesis leaves lone surrogates out unless they are asked for.
any_text = st.text(st.characters(exclude_categories=()))


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


class EndlessError(Exception):
    def __str__(self) -> str:
        return str(self)


def decision(error: BaseException, attempt: int = 1, handled: tuple[str, ...] = ()) -> Reschedule | DeadLetter:
    return decide(error, handler="shop.pay", attempt=attempt, policy=POLICY, handled=handled, rng=Random(1))


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001 - it is what the test asked for
        return caught


# decide


def test_an_error_is_tried_again_after_a_pause_of_the_policy() -> None:
    for attempt, bound in [(1, 1.0), (2, 2.0)]:
        outcome = decision(ValueError("no"), attempt)
        assert isinstance(outcome, Reschedule)
        assert outcome.counted
        assert timedelta(0) <= outcome.delay <= timedelta(seconds=bound)
        assert outcome.failure == describe(ValueError("no"), "shop.pay")


@pytest.mark.parametrize("attempt", [3, 4, 1000])
@pytest.mark.parametrize("error", [ValueError("no"), Retry(), Retry(timedelta(seconds=1))])
def test_the_last_attempt_that_fails_is_final(error: Exception, attempt: int) -> None:
    outcome = decision(error, attempt)
    assert isinstance(outcome, DeadLetter)
    assert outcome.failure.handler == "shop.pay"


def test_a_rejected_delivery_is_dead_in_its_first_attempt() -> None:
    outcome = decision(Reject("no such customer"))
    assert isinstance(outcome, DeadLetter)
    assert outcome.failure.message == "no such customer"


@pytest.mark.parametrize("delay", [timedelta(0), timedelta(hours=3), MAX_DELAY])
def test_retry_chooses_the_pause_and_counts(delay: timedelta) -> None:
    outcome = decision(Retry(delay))
    assert isinstance(outcome, Reschedule)
    assert outcome.delay == delay
    assert outcome.counted
    assert outcome.failure is not None


def test_retry_without_a_pause_takes_the_one_of_the_policy() -> None:
    outcome = decision(Retry())
    assert isinstance(outcome, Reschedule)
    assert timedelta(0) <= outcome.delay <= POLICY.first


@pytest.mark.parametrize("attempt", [1, 3, 1000])
def test_snooze_is_neither_counted_nor_a_failure(attempt: int) -> None:
    """Not even when the attempts are used up: a delivery that only waits must not die of it."""
    assert decision(Snooze(timedelta(days=1)), attempt) == Reschedule(timedelta(days=1), counted=False)


def test_a_signal_goes_before_what_the_policy_calls_final() -> None:
    """The handler that raises it knows more than its policy, which may say Exception."""
    policy = RetryPolicy(max_attempts=3, dead_on=(Exception,))
    for signal in (Retry(), Retry(timedelta(0)), Snooze(timedelta(0))):
        outcome = decide(signal, handler=None, attempt=1, policy=policy, rng=Random(1))
        assert isinstance(outcome, Reschedule)
    for error in (Reject("no"), ValueError("no")):
        outcome = decide(error, handler=None, attempt=1, policy=policy, rng=Random(1))
        assert isinstance(outcome, DeadLetter)
    assert isinstance(decide(Retry(), handler=None, attempt=3, policy=policy, rng=Random(1)), DeadLetter)


@pytest.mark.parametrize("error", [ValueError(), Retry(timedelta(0)), Snooze(timedelta(0)), Reject("never")])
def test_handlers_that_succeeded_are_remembered(error: Exception) -> None:
    assert decision(error, handled=("shop.log", "shop.mail")).handled == ("shop.log", "shop.mail")


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), BaseExceptionGroup("all", [SystemExit(1)])])
def test_what_is_no_exception_is_decided_like_one(error: BaseException) -> None:
    assert isinstance(decision(error), Reschedule)


# describe


def test_builtin_types_go_by_their_name_and_others_by_their_path() -> None:
    assert describe(ValueError("x"), None).type == "ValueError"
    assert describe(SilentError(), None).type == f"{__name__}.SilentError"
    assert describe(json.JSONDecodeError("x", "", 0), None).type == "json.decoder.JSONDecodeError"


def test_the_traceback_says_where() -> None:
    trace = describe(raised(ValueError("no")), None).traceback
    assert trace is not None
    assert __file__ in trace
    assert trace.endswith("ValueError: no\n")


def test_an_error_that_can_not_be_printed_is_described_all_the_same() -> None:
    failure = describe(raised(SilentError()), "shop.pay")
    assert failure.message == "<str() of the error raised RuntimeError>"
    assert failure.type == f"{__name__}.SilentError"
    assert failure.traceback is not None


def test_an_error_whose_text_never_ends_is_described_all_the_same() -> None:
    assert describe(raised(EndlessError()), None).message == "<str() of the error raised RecursionError>"


def test_a_traceback_that_can_not_be_formatted_does_not_hide_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> list[str]:
        raise KeyError("broken __notes__")

    monkeypatch.setattr("pgebus._runtime.outcome.traceback.format_exception", refuse)
    failure = describe(ValueError("no"), None)
    assert failure.message == "no"
    assert failure.traceback == "<formatting the traceback raised KeyError>"


def test_causes_in_a_circle_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    failure = describe(one, None)
    assert failure.traceback is not None
    assert "other" in failure.traceback


def test_a_long_chain_of_causes_is_capped() -> None:
    error = ValueError("root")
    for number in range(300):
        above = ValueError(f"above {number}")
        above.__cause__ = error
        error = above
    trace = describe(error, None).traceback
    assert trace is not None
    assert len(trace) == MAX_TRACEBACK_CHARS
    assert trace.endswith("ValueError: above 299\n")


def test_megabytes_of_message_are_cut() -> None:
    failure = describe(raised(ValueError("x" * 3_000_000)), None)
    assert len(failure.message) == MAX_MESSAGE_CHARS
    assert failure.message.endswith("x…")
    assert failure.traceback is not None
    assert len(failure.traceback) == MAX_TRACEBACK_CHARS


@given(any_text)
def test_whatever_an_error_says_can_be_stored(text: str) -> None:
    failure = describe(ValueError(text), None)
    stored = json.dumps(failure.entry(attempt=1, worker_id=2**62), ensure_ascii=False)
    assert "\x00" not in stored
    assert "\x00" not in json.loads(stored)["message"]
    stored.encode()  # raises on a lone surrogate


def test_the_entry_carries_the_worker_as_text() -> None:
    """Numbers above 2**53 do not survive a JSON reader that knows floats only."""
    entry = Failure("shop.pay", "ValueError", "no").entry(attempt=3, worker_id=2**62)
    assert entry == {
        "attempt": 3,
        "worker": "4611686018427387904",
        "handler": "shop.pay",
        "type": "ValueError",
        "message": "no",
        "traceback": None,
    }


# in_ascii


@given(st.builds(Failure, st.none() | any_text, any_text, any_text, st.none() | any_text))
def test_in_ascii_every_other_character_is_replaced_and_nothing_else(failure: Failure) -> None:
    """A database's encoding may lack any of them, but none lacks these."""
    plain = failure.in_ascii()
    for before, after in [
        (failure.handler, plain.handler),
        (failure.type, plain.type),
        (failure.message, plain.message),
        (failure.traceback, plain.traceback),
    ]:
        assert (after is None) == (before is None)
        if before is not None and after is not None:
            assert after == "".join(character if character.isascii() else "?" for character in before)
    assert plain.in_ascii() == plain


# clean


@given(any_text, st.integers(min_value=1, max_value=8), st.booleans())
def test_cleaned_text_fits_and_can_be_stored(text: str, limit: int, keep_end: bool) -> None:
    cleaned = clean(text, limit, keep_end=keep_end)
    assert len(cleaned) <= limit
    assert "\x00" not in cleaned
    assert cleaned.encode().decode() == cleaned
    assert clean(cleaned, limit, keep_end=keep_end) == cleaned


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40), st.booleans())
def test_text_that_fits_and_can_be_stored_is_left_alone(text: str, keep_end: bool) -> None:
    assert clean(text, 40, keep_end=keep_end) == text


def test_the_cut_is_marked_at_the_side_that_was_cut() -> None:
    assert clean("abcdef", 4) == "abc…"
    assert clean("abcdef", 4, keep_end=True) == "…def"
    assert clean("abcdef", 6) == clean("abcdef", 6, keep_end=True) == "abcdef"
    assert clean("abcdef", 1) == clean("abcdef", 1, keep_end=True) == "…"


def test_nul_and_lone_surrogates_are_replaced() -> None:
    assert clean("a\x00b\ud800c\udfffd", 10) == "a\N{REPLACEMENT CHARACTER}b?c?d"


# redact


def test_a_redactor_sees_the_message_and_the_traceback() -> None:
    failure = describe(raised(ValueError("token=abc")), "shop.pay", lambda text: text.replace("abc", "***"))
    assert failure.message == "token=***"
    assert failure.traceback is not None
    assert "token=***" in failure.traceback
    assert "abc" not in failure.traceback.replace("abc.", "")


def test_a_secret_at_the_cap_is_not_cut_in_two() -> None:
    """What is stored is cut after it was redacted, not before."""
    secret = "s3cr3t" * 10
    text = "x" * (MAX_MESSAGE_CHARS - 30) + secret
    failure = describe(ValueError(text), None, lambda text: text.replace(secret, "***"))
    assert failure.message.endswith("x***")
    assert "s3cr3t" not in f"{failure.message}{failure.traceback}"


def test_a_redactor_is_given_only_so_much() -> None:
    given: list[str] = []

    def note(text: str) -> str:
        given.append(text)
        return text

    failure = describe(ValueError("x" * 10_000_000 + "\x00\ud800"), None, note)
    assert {len(text) <= 65_536 for text in given} == {True}
    assert len(failure.message) == MAX_MESSAGE_CHARS


def _fails(text: str) -> str:
    raise RuntimeError(text)


@pytest.mark.parametrize(
    ("redact", "kept"),
    [
        (_fails, "<the redactor raised RuntimeError>"),
        (lambda text: None, "<the redactor returned NoneType>"),
        (lambda text: text.encode(), "<the redactor returned bytes>"),
        (lambda text: "\x00\ud800" + "y" * 100_000, "\N{REPLACEMENT CHARACTER}?" + "y" * 1_021 + "…"),
    ],
)
def test_a_redactor_that_fails_spoils_nothing_and_lets_nothing_through(redact: Any, kept: str) -> None:
    failure = describe(raised(ValueError("secret")), None, redact)
    assert (failure.type, failure.message) == ("ValueError", kept)
    assert "secret" not in str(failure.traceback)


def test_what_postgresql_quotes_of_a_row_is_left_out() -> None:
    """Its DETAIL may be a payload; which constraint was broken is in the message."""
    said = asyncpg.UniqueViolationError('duplicate key value violates unique constraint "k"')
    said.detail = "Failing row contains (1, secret)."
    assert "secret" in str(said)
    try:
        try:
            raise said
        except asyncpg.PostgresError as error:
            raise ValueError("wrapped") from error
    except ValueError as error:
        both = [describe(said, None), describe(error, None), describe(ExceptionGroup("all", [error]), None)]
    for failure in both:
        assert "secret" not in f"{failure.message}{failure.traceback}"
        assert 'unique constraint "k"' in str(failure.traceback)

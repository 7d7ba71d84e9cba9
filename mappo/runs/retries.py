"""The retries of requests to a store or a database that may not answer for a while."""

from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential


def make_retrying(
    is_retryable: Callable[[BaseException], bool],
    patience_seconds: float,
    max_wait_seconds: float,
    before_wait: Callable[[RetryCallState], None],
) -> Retrying:
    """Return tenacity's loop of retries: after 0.2 s, then twice as long each time, until the patience ends.

    The last error is raised as it is. The waits have no jitter, which would draw from Python's random numbers, as
    training does.
    """
    return Retrying(
        retry=retry_if_exception(is_retryable),
        stop=stop_after_delay(patience_seconds),
        wait=wait_exponential(multiplier=0.2, max=max_wait_seconds),
        before_sleep=before_wait,
        reraise=True,
    )

"""The placeholder for the time of a run in names."""

import pytest

from components.placeholders import SCHEDULED_TIME, fill, has_placeholder
from mappo.errors import ConfigError

AT = "2026-11-28T20:48:00Z"  # the format of the driver of Kubeflow Pipelines 2.17.0


def test_fill_replaces_the_placeholder_by_the_time():
    assert fill("nightly-[[ScheduledTime]]", AT) == "nightly-20261128204800"
    assert fill("[[ScheduledTime]]/[[ScheduledTime]]", AT) == "20261128204800/20261128204800"


def test_fill_converts_to_utc():
    assert fill(SCHEDULED_TIME, "2026-11-28T21:48:00+01:00") == "20261128204800"


@pytest.mark.parametrize("text", ["", "first", "s3://bucket/runs", '[["a"]]', "[[1]]"])
def test_fill_returns_other_text_unchanged(text):
    assert fill(text, "") == text
    assert not has_placeholder(text)


@pytest.mark.parametrize(
    "placeholder",
    [
        "[[CurrentTime]]",
        "[[Index]]",
        "[[RunUUID]]",
        "[[ScheduledTime.2006-01-02T15:04]]",
        "[[scheduledtime]]",
        "[[ScheduledTime]",
        "[[ScheduledTime",
    ],
)
def test_fill_refuses_other_placeholders_and_names_the_right_one(placeholder):
    with pytest.raises(ConfigError, match=r"write \[\[ScheduledTime\]\]") as error:
        fill(f"run-{placeholder}", AT)
    assert placeholder in str(error.value)
    assert has_placeholder(placeholder)


@pytest.mark.parametrize("time", ["", "{{$.pipeline_job_schedule_time_utc}}", "yesterday", "2026-11-28T20:48:00"])
def test_fill_refuses_a_placeholder_without_a_time(time):
    with pytest.raises(ConfigError, match="needs the time of the run"):
        fill(SCHEDULED_TIME, time)

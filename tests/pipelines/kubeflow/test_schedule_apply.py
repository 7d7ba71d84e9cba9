"""The schedules of a file on a test server: plans, owners, replacements and what an interruption leaves."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.kubeflow.cron import Cron
from pipelines.kubeflow.quiet import quiet_delay

GOLDEN = Path("tests/golden/training.yaml").absolute()
NIGHTLY = 'nightly: {cron: "30 2 * * *"}'
WEEKLY = "weekly: {cron: 0 3 * * 6, max_concurrency: 2}"


@pytest.fixture
def write(tmp_path) -> Callable[..., str]:
    """Return a function that writes entries into a file of schedules and returns its path."""

    def write(*entries: str, owner: str = "a", name: str = "schedules.yaml") -> str:
        lines = "\n".join(f"  {entry}" for entry in entries)
        schedules = f"schedules:\n{lines}" if entries else "schedules: {}"
        (tmp_path / name).write_text(f"owner: {owner}\ndefaults: {{file: {GOLDEN}}}\n{schedules}\n")
        return str(tmp_path / name)

    return write


@pytest.fixture
def apply(read) -> Callable[..., dict[str, str]]:
    """Return a function that applies a file and returns the change of each schedule."""

    def apply(*arguments: str) -> dict[str, str]:
        return {row["schedule"]: row["change"] for row in read("schedule", "apply", *arguments)}

    return apply


def times_of(kubeflow) -> dict[str, str]:
    jobs = kubeflow.recurring_runs.values()
    return {job["display_name"]: job["trigger"]["cron_schedule"]["cron"] for job in jobs}


def test_file_applied_twice_changes_nothing_the_second_time(kubeflow, write, apply):
    path = write(NIGHTLY, WEEKLY)
    assert apply(path) == {"nightly": "created", "weekly": "created"}
    before, sent = dict(kubeflow.recurring_runs), len(kubeflow.requests)
    assert apply(path) == {"nightly": "unchanged", "weekly": "unchanged"}
    assert kubeflow.recurring_runs == before
    assert {method for method, *_ in kubeflow.requests[sent:]} == {"GET"}
    assert times_of(kubeflow) == {"nightly": "0 30 2 * * *", "weekly": "0 0 3 * * 6"}
    assert {job["max_concurrency"] for job in kubeflow.recurring_runs.values()} == {"1", "2"}


def test_entry_makes_the_same_schedule_as_the_flags_of_create(kubeflow, read, apply, tmp_path):
    (tmp_path / "site.yaml").write_text("image: a:1\n")
    (tmp_path / "schedules.yaml").write_text(
        "owner: a\ndefaults:\n  site: site.yaml\n  parameter: {store: 's3://bucket/runs', train_cpu: 3}\n"
        "schedules:\n  file: {cron: '@daily', recipe: balance, seeds: [0, 1], learner.clip_epsilon: 0.1,\n"
        "    parameter: {run: 'n-[[ScheduledTime]]', train_cpu: '4'}, service-account: me}\n"
    )
    apply("schedules.yaml")
    flags = ["--site", "site.yaml", "--seeds", "0,1", "--learner.clip-epsilon", "0.1", "--service-account", "me"]
    flags += ["-p", "store=s3://bucket/runs", "-p", "run=n-[[ScheduledTime]]", "-p", "train_cpu=4"]
    read("schedule", "create", "flags", "balance", "--cron", "@daily", *flags)
    by_file, by_flags = kubeflow.recurring_runs.values()
    differing = {"recurring_run_id", "display_name", "description", "created_at", "updated_at"}
    assert {key for key in by_file if by_file[key] != by_flags[key]} <= differing
    assert by_file["description"].replace(" schedule, owner a [", " schedule [") == by_flags["description"]


@pytest.mark.long
def test_example_of_the_docs_can_be_applied(kubeflow, apply, tmp_path):
    page = (GOLDEN.parents[2] / "docs" / "gitops.md").read_text()
    (tmp_path / "schedules.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    (tmp_path / "site.yaml").write_text("image: a:1\n")
    assert apply("schedules.yaml") == {"nightly": "created", "weekly-study": "created"}
    nightly, weekly = kubeflow.recurring_runs.values()
    assert nightly["runtime_config"]["parameters"].keys() == {"store", "run"}
    assert weekly["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "mappo-tuning"


def test_dry_run_shows_every_difference_and_sends_no_change(kubeflow, read, write, apply):
    apply(write(NIGHTLY, WEEKLY, "old: {cron: '@daily'}"))
    changed = "nightly: {cron: 45 2 * * *, experiment: other, learner.epochs: 7, parameter: {train_cpu: '3'}}"
    sent = len(kubeflow.requests)
    rows = read("schedule", "apply", write(changed, WEEKLY, "new: {cron: '@daily'}"), "--dry-run")
    assert {row["schedule"]: row["change"] for row in rows} == {
        "nightly": "replace",
        "weekly": "keep",
        "new": "create",
        "old": "leave",
    }
    differences = rows[0]["message"].split("; ")
    assert differences[:2] == ["cron: 0 30 2 * * * -> 0 45 2 * * *", "experiment: now other"]
    assert "parameter train_cpu: nothing -> 3" in differences
    assert any(text.startswith("parameter config.learner.epochs: nothing -> 7") for text in differences)
    assert {method for method, *_ in kubeflow.requests[sent:]} == {"GET"}


def test_difference_of_the_configuration_names_its_field(kubeflow, read, tmp_path):
    def dry_run(clip: float, *flags: str) -> list[dict]:
        text = f"owner: a\nschedules: {{n: {{cron: '@daily', image: a:1, learner.clip-epsilon: {clip}}}}}"
        (tmp_path / "s.yaml").write_text(text)
        return read("schedule", "apply", "s.yaml", *flags)

    dry_run(0.1)
    (row,) = dry_run(0.3, "--dry-run")
    assert row["message"] == "default of config.learner.clip_epsilon: 0.1 -> 0.3"


def test_pruning_removes_only_schedules_of_the_files_owner(kubeflow, read, write, apply):
    apply(write(NIGHTLY, WEEKLY))
    apply(write("theirs: {cron: '@daily'}", owner="b", name="b.yaml"))
    read("schedule", "create", "by-hand", "--cron", "@daily", "--file", str(GOLDEN))
    assert apply(write(NIGHTLY)) == {"nightly": "unchanged", "weekly": "left"}
    assert "weekly" in times_of(kubeflow), "without --prune nothing is removed"
    assert apply(write(NIGHTLY), "--prune") == {"nightly": "unchanged", "weekly": "removed"}
    assert set(times_of(kubeflow)) == {"nightly", "theirs", "by-hand"}
    assert apply(write(), "--prune") == {"nightly": "removed"}


@pytest.mark.parametrize("other", ["hand", "owner"])
def test_schedule_of_somebody_else_is_never_replaced(kubeflow, cli, read, write, apply, other):
    if other == "hand":
        read("schedule", "create", "nightly", "--cron", "@hourly", "--file", str(GOLDEN))
    else:
        apply(write(NIGHTLY, owner="b", name="b.yaml"))
    before = dict(kubeflow.recurring_runs)
    status, _, err = cli("schedule", "apply", write(WEEKLY, "nightly: {cron: '@daily'}"))
    assert status == 2
    assert "schedule 'nightly'" in err
    assert kubeflow.recurring_runs == before, "not even weekly is created"
    if other == "owner":
        assert cli("schedule", "create", "nightly", "--cron", "@daily", "--file", str(GOLDEN))[0] == 2
        assert kubeflow.recurring_runs == before


def test_replaced_removed_and_deleted_schedules_let_their_runs_continue(kubeflow, read, write, apply):
    apply(write(NIGHTLY, WEEKLY))
    read("schedule", "create", "by-hand", "--cron", "@daily", "--file", str(GOLDEN))
    runs = [kubeflow.fire(job) for job in list(kubeflow.recurring_runs)]
    for run in runs:
        kubeflow.reach(run, "train")
    apply(write("nightly: {cron: '@daily'}"), "--prune")
    read("schedule", "delete", "by-hand")
    assert [kubeflow.finish(run) for run in runs] == ["SUCCEEDED"] * 3


def test_paused_schedule_stays_paused_when_its_entry_changes(kubeflow, read, write, apply):
    apply(write(NIGHTLY))
    read("schedule", "pause", "nightly")
    assert apply(write("nightly: {cron: '@hourly'}")) == {"nightly": "replaced"}
    (job,) = kubeflow.recurring_runs.values()
    assert job["status"] == "DISABLED"


@pytest.mark.parametrize(
    ("method", "status"), [("POST", 400), ("DELETE", 400)], ids=["creation refused", "deletion refused"]
)
def test_next_apply_mends_what_a_failure_half_way_left(kubeflow, cli, write, apply, method, status):
    apply(write(NIGHTLY, WEEKLY))
    path = write("nightly: {cron: '@hourly'}", "weekly: {cron: '@weekly'}")
    kubeflow.fail(status, method=method, path="/recurringruns")
    failed, out, _ = cli("schedule", "apply", path)
    assert failed == 3
    assert "weekly" not in out
    jobs = [job["display_name"] for job in kubeflow.recurring_runs.values()]
    assert "nightly" in jobs, "there is always one"
    assert jobs.count("nightly") == (1 if method == "POST" else 2)
    assert apply(path) == {"nightly": "replaced", "weekly": "replaced"}
    assert times_of(kubeflow) == {"nightly": "0 0 * * * *", "weekly": "0 0 0 * * 0"}
    assert len(kubeflow.recurring_runs) == 2
    assert apply(path) == {"nightly": "unchanged", "weekly": "unchanged"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "owner: a\nschedules:\n  n:\n    crno: '@daily'",
            "line 4: schedule n: crno: unknown key; did you mean cron?",
        ),
        ("owner: a\nschedules:\n  n:\n    endpoint: http://a", "line 4: schedule n: endpoint: unknown key"),
        ("owner: a\nshedules: {}", "line 2: the file: shedules: unknown key; did you mean schedules?"),
        ("schedules: {}", "owner: missing"),
        ("owner: A b\nschedules: {}", "line 1: owner 'A b': a name has"),
        ("owner: a\nschedules:\n  n: {cron: a}\n  n: {cron: b}", "line 4: schedules: n: given more than once"),
        ("owner: a\nschedules: {n: {max_concurrency: 1, max-concurrency: 2}}", "max-concurrency: given more than"),
        ("owner: a\nschedules: {n: {}}", "schedule n: the following arguments are required: --cron"),
        ("owner: a\nschedules: {n: {cron: '@daily', image: 'a'}}", "line 2: schedule n: image 'a': must be"),
        ("owner: a\nschedules: {n: {cron: 1 2}}", "line 2: schedule n: cron '1 2': must be 5 fields"),
        (
            "owner: a\nschedules: {n: {cron: '@daily', space: {a: 1}}}",
            "space: must be a text; write JSON in quotes",
        ),
        (
            "owner: a\nschedules: {n: {cron: '@daily', max-concurrency: 11}}",
            "--max-concurrency 11: must be 1 to 10",
        ),
        ("owner: a\nschedules: {n: {cron: '@daily', file: no.yaml}}", "no.yaml"),
        ("owner: a\nschedules: [n]", "line 2: schedules: must hold keys and values"),
        ("owner: a\nschedules: {n: {cron: @daily}}", "not YAML: line 2"),
    ],
)
def test_wrong_file_is_refused_with_file_and_line_before_any_request(kubeflow, cli, tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    status, _, err = cli("schedule", "apply", "s.yaml")
    assert status == 2
    assert f"s.yaml: {message}" in err or ("s.yaml" in err and message in err)
    assert not kubeflow.requests


def test_all_wrong_entries_are_named_at_once(kubeflow, cli, write):
    status, _, err = cli(
        "schedule", "apply", write("one: {cron: x}", "two: {cron: '@daily', experiment: e, seed: x}")
    )
    assert status == 2
    assert "schedule one: cron 'x'" in err
    assert "schedule two: " in err


DAY = datetime(2026, 11, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("crons", "now", "seconds"),
    [
        (["30 2 * * *"], "02:00:00", 0),
        (["30 2 * * *"], "02:29:49", 0),  # the run of 02:30:00 is due after both requests
        (["30 2 * * *"], "02:29:50", 55),  # the requests may take until 02:30:00: wait until 02:30:45
        (["30 2 * * *"], "02:30:20", 25),
        (["30 2 * * *"], "02:30:45", 0),
        (["30 2 * * *", "50 30 2 * * *"], "02:30:20", 75),  # of the other schedule, 02:30:50
        (["* * * * *"], "02:30:00", 45),  # five seconds of each minute are free
        (["*/10 * * * * *"], "02:30:00", None),
    ],
)
def test_replacement_waits_until_no_run_is_due(crons, now, seconds):
    clock = datetime.combine(DAY, datetime.strptime(now, "%H:%M:%S").time(), UTC)
    delay = quiet_delay([Cron.parse(cron) for cron in crons], clock)
    assert delay == (None if seconds is None else timedelta(seconds=seconds))


def between(cron: Cron, after: datetime, end: datetime) -> list[datetime]:
    return list(takewhile(lambda time: time <= end, cron.times(after)))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["* * * * *", "*/2 * * * *", "0 * * * *", "7,8 * * * *"]),
    st.sampled_from(["* * * * *", "*/3 * * * *", "1 * * * *", "50 8 * * * *"]),
    st.integers(0, 3600),
    st.floats(0, 5),
    st.floats(0, 5),
    st.integers(0, 45),
)
def test_every_time_starts_one_run_whenever_a_schedule_is_replaced(old, new, second, creation, deletion, latency):
    """Play the server: a schedule starts a run `latency` seconds after its time, if it is older than the time."""
    old_cron, new_cron, now = Cron.parse(old), Cron.parse(new), DAY + timedelta(seconds=second)
    delay = quiet_delay([old_cron, new_cron], now)
    assert delay is not None
    created = now + delay + timedelta(seconds=creation)
    deleted = created + timedelta(seconds=deletion)
    begin, end, late = now - timedelta(minutes=5), now + timedelta(minutes=10), timedelta(seconds=latency)
    started = [time for time in between(old_cron, begin, end) if time + late < deleted]
    started += between(new_cron, created, end)
    assert started == between(old_cron, begin, created) + between(new_cron, created, end)

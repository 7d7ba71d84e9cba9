"""A database that holds what mappo did not write: every command says so in one line."""

import json
import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from mappo.__main__ import main
from mappo.errors import MappoError, StudyUnreadable
from mappo.recipes import recipe
from mappo.reporting.tables import best_lines, trial_table
from mappo.stages.choose import chosen_configuration
from mappo.tuning.catalogue import editions, study_names
from mappo.tuning.database import Database
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import Choices, default_space
from mappo.tuning.study import Study, delete_study
from mappo.tuning.study_config import Ending, TuningConfig
from tests.support.services import postgres

CONFIG = recipe("navigation")
SPACE = {**default_space(CONFIG), "networks.hidden_sizes": Choices("categorical", ([256, 256], [64, 64]))}
PLAN = Plan(CONFIG, SPACE, TuningConfig(grace_seconds=2, max_losses=1000))
CELLS = {  # columns that anybody who can write to the database can fill, by table
    "study_user_attributes": ("key", "value_json"),
    "study_system_attributes": ("value_json",),
    "study_directions": ("direction", "objective"),
    "trials": ("state", "number", "datetime_start"),
    "trial_user_attributes": ("key", "value_json"),
    "trial_system_attributes": ("key", "value_json"),
    "trial_params": ("param_name", "param_value", "distribution_json"),
    "trial_values": ("value", "value_type", "objective"),
    "trial_intermediate_values": ("step", "intermediate_value", "intermediate_value_type"),
}
TEXTS = [
    *(
        "[" * 1000,
        "[" * 300 + "]" * 300,
        "9" * 5000,
        "-" + "9" * 400,
        "1e999",
        "NaN",
        "-Infinity",
        "null",
        "[]",
        "{}",
    ),
    *('""', "true", "-1", "0.5", '"x"', "", "not json", '{"a"', '"\\u0000\\ud800"', '"a\\nb"', "\ud7ff\n\x1b[31m"),
    *('"' + "x" * 100_000 + '"', '{"' + "k" * 10_000 + '\\n": 1}', '[{"worker": 1}]', '[null, 5, "a"]'),
]
VALUES = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "a\nb",
    "x" * 5000,
    [],
    [[]],
    {},
    {"a": 1},
]


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Iterator[Database]:
    """Return a database in which the study `s` has a trial in every state; its file has a copy, `template`."""
    directory = tmp_path_factory.mktemp("malformed")
    database = Database(f"sqlite:///{directory}/studies.db", patience_seconds=0.2)
    for engine in (database._engine, database.storage.engine):  # spare the disk
        sqlalchemy.event.listen(
            engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF")
        )
        engine.dispose()
    fill(database)
    (directory / "template").write_bytes((directory / "studies.db").read_bytes())
    yield database
    database.close()


def fill(database: Database) -> None:
    study = Study.prepare(database, "s", PLAN, 12, series="series", timeout_seconds=3600)
    study.keep_ending(Ending())
    for number, outcome in enumerate(["complete"] * 4 + ["pruned", "failed"]):
        claim = study.claim(f"worker-{number}")
        claim.report_frames(30_000, 0.1 * number)
        claim.finish(outcome, 0.1 * number if outcome == "complete" else None, "a reason")
    claim = study.claim("released")
    study.claim("silent")
    claim.release()
    Study.prepare(database, "other", PLAN, 2, series="series")


def restore(database: Database) -> None:
    """Copy the template into the database, whose connections stay open."""
    file = Path(database.storage.engine.url.database)
    with (
        closing(sqlite3.connect(file.with_name("template"))) as template,
        closing(sqlite3.connect(file)) as target,
    ):
        template.backup(target)


def mutated(text: Any, generator: random.Random) -> Any:
    """Return another content for a cell: any text, or its JSON with one thing changed, added or removed."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):  # an earlier change has made it so
        value = None
    if not isinstance(value, list | dict) or generator.random() < 0.4:
        return generator.choice(TEXTS)
    container = value
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = generator.choice(keys) if keys else None
        if key is not None and isinstance(container[key], list | dict) and generator.random() < 0.7:
            container = container[key]
            continue
        change = generator.random()
        if key is not None and change < 0.3:
            del container[key]
        elif key is not None and change < 0.8:
            container[key] = generator.choice(VALUES)
        elif isinstance(container, dict):
            container[generator.choice(["", "a\nb", "x" * 500, "type"])] = generator.choice(VALUES)
        else:
            container.insert(0, generator.choice(VALUES))
        return json.dumps(value)


def mutate(database: Database, generator: random.Random) -> str:
    """Replace one to three cells, or delete a row; return a description."""
    changes = []
    with closing(sqlite3.connect(database.storage.engine.url.database)) as connection:
        for _ in range(generator.choice([1, 1, 1, 2, 3])):
            table = generator.choice(list(CELLS))
            rows = connection.execute(f"SELECT rowid FROM {table}").fetchall()
            if not rows:
                continue
            (row,) = generator.choice(rows)
            if generator.random() < 0.1:
                connection.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))
                changes.append(f"delete {table} {row}")
                continue
            column = generator.choice(CELLS[table])
            (cell,) = connection.execute(f"SELECT {column} FROM {table} WHERE rowid = ?", (row,)).fetchone()
            content = mutated(cell, generator)
            with suppress(sqlite3.Error):  # a constraint of the table
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (content, row))
                changes.append(f"{table}.{column} {row} = {content[:80]!r}")
        connection.commit()
    return "; ".join(changes)


def work(study: Study) -> None:
    """Claim and finish a trial as a worker does, without training."""
    claim = study.claim("w")
    if claim is None:
        study.is_settled()
        return
    study._heartbeat(claim)
    claim.report_frames(60_000, 0.2)
    claim.finish("complete", 0.5)


def show(study: Study) -> None:
    trials, best = study.trials(), study.best()
    trial_table(trials)
    json.dumps([trial.seconds for trial in trials], allow_nan=False)
    if best:
        best_lines(best, study.plan.config)
        chosen_configuration(study, 2)
    assert study.num_trials >= 0
    assert study.store
    assert study.ending


def actions(database: Database) -> list[Callable[[], object]]:
    def loaded(action: Callable[[Study], object]) -> Callable[[], object]:
        return lambda: action(Study.load(database, "s"))

    return [
        lambda: study_names(database),
        lambda: editions(database, "series"),
        loaded(show),
        loaded(work),
        loaded(lambda study: study.abandon("w")),
        loaded(lambda study: study.request_trials(20, 60.0)),
        lambda: Study.prepare(database, "s", PLAN, 12, timeout_seconds=3600),
        lambda: delete_study(database, "s"),
    ]


def outcome(action: Callable[[], object]) -> str:
    """Return "done", "refused", or what is wrong with the error that an action raises."""
    try:
        action()
    except MappoError as error:
        text = str(error)
        return "refused" if text.isprintable() and len(text) < 1000 else f"message: {text[:300]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]!r}"
    return "done"


def check(database: Database, seeds: range) -> None:
    refused, wrong = 0, []
    for seed in seeds:
        restore(database)
        description = mutate(database, random.Random(seed))
        for index, action in enumerate(actions(database)):
            result = outcome(action)
            refused += result == "refused"
            if result not in ("done", "refused"):
                wrong.append(f"seed {seed}, action {index}: {result}; {description}")
    assert wrong == []
    assert refused > len(seeds) / 4


def test_malformed_databases_are_refused_in_one_line(database):
    check(database, range(60))


@pytest.mark.long
def test_thousands_of_malformed_databases_are_refused_in_one_line(database):
    check(database, range(1000, 11_000))


@pytest.fixture(scope="module")
def server():
    with postgres() as server:
        yield server


def set_attribute(database: Database, key: str, text: str) -> str:
    """Replace an attribute of the study `s` and return the one before."""
    where = sqlalchemy.text("FROM study_user_attributes WHERE key = :key AND study_id = 1")
    update = "UPDATE study_user_attributes SET value_json = :text WHERE key = :key AND study_id = 1"
    with database.storage.engine.begin() as connection:
        before = connection.execute(sqlalchemy.text(f"SELECT value_json {where}"), {"key": key}).scalar_one()
        connection.execute(sqlalchemy.text(update), {"text": text, "key": key})
    return str(before)


def test_malformed_attributes_in_postgresql_name_the_study_and_leave_the_others_alone(server):
    with closing(Database(server.create("malformed"), patience_seconds=5)) as database:
        fill(database)
        for key in ("plan", "place", "sessions", "ending"):
            for text in ("[" * 1000, "9" * 5000, "NaN", '{"config": []}', "not json"):
                before = set_attribute(database, key, text)
                assert study_names(database) == ["other", "s"]
                assert editions(database, "series") == ["other", "s"]
                with pytest.raises(StudyUnreadable, match="^study s: ") as error:
                    show(Study.load(database, "s"))
                assert str(error.value).isprintable()
                set_attribute(database, key, before)
                show(Study.load(database, "other"))
        work(Study.load(database, "other"))


@pytest.mark.parametrize(
    ("key", "text"), [("plan", "[" * 1000), ("plan", '{"config": 1}'), ("sessions", '[{"trials": "x"}]')]
)
def test_commands_print_one_line_about_a_malformed_study_and_list_the_others(
    database, monkeypatch, capfd, tmp_path, key, text
):
    restore(database)
    set_attribute(database, key, text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAPPO_DATABASE", database.storage.engine.url.render_as_string())
    for command in (["show", "s"], ["work", "s"], ["resume", "s"], ["list"]):
        status = main(["study", *command])
        shown = "".join(capfd.readouterr())
        assert "Traceback" not in shown
        if command == ["list"]:
            assert status == 0
            lines = shown.splitlines()
            assert len(lines) == 3
            assert lines[1].startswith("other ")
            assert "0/2" in lines[1]
            assert "study s: " in lines[2]
        else:
            assert status == 1
            assert len(re.findall(r"(\] failed|: error): ", shown)) == 1
            assert len(shown.splitlines()) == 1, shown

"""The table of runs: conditions, sorting, cells, and its page in a browser."""

from dataclasses import replace
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from mappo.config import override
from mappo.errors import ConfigError
from mappo.recipes import nearest_recipe, recipe
from mappo.reporting.overview_page import build
from mappo.reporting.overview_table import lines, rows_of
from mappo.runs.overview import Interval, RunSummary, Training
from mappo.strict_json import to_dict
from tests.support.browser import chromium, complaints, emulate, open_page, requests

NOW = 1_000_000.0


def run(
    name: str, value: float | None = None, hours: float = 1.0, is_finished: bool = True, **changes
) -> RunSummary:
    config = override(recipe("navigation"), changes)
    name_of_recipe, differing = nearest_recipe(config)
    training = Training(
        task="navigation",
        algorithm="MAPPO",
        recipe=name_of_recipe,
        changes={field: other for field, other in differing.items() if field != "seed"},
        seed=config.seed,
        frames=84_000 if is_finished else 6_000,
        final_frames=84_000,
        is_finished=is_finished,
        highest_return=value,
        started_from="",
        device="cpu",
        config=to_dict(config),
    )
    evaluation = None if value is None else Interval(value, value - 0.1, value + 0.1)
    return RunSummary(name, f"runs/{name}", training=training, evaluation=evaluation, modified=NOW - 3600 * hours)


RUNS = [
    replace(run("a", 0.5, hours=3), tags=("good",), measurements={"collisions": Interval(2.0)}),
    replace(run("b", 0.9, hours=50, learner={"clip_epsilon": 0.1}), comment="too slow"),
    run("c", None, hours=2, is_finished=False, seed=3),
    RunSummary("d", "runs/d", problem="damaged or replaced", modified=NOW),
]


def names(*conditions: str, **options) -> str:
    return "".join(row.summary.name for row in rows_of(RUNS, NOW, conditions, **options))


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([], "dcab"),  # the newest first
        (["evaluation>0.6"], "b"),
        (["evaluation<=0.5"], "a"),
        (["evaluation!=0.5"], "dcb"),
        (["age<24"], "dca"),
        (["tag=good"], "a"),
        (["tag!=good"], "dcb"),
        (["state=finished"], "ab"),
        (["state=unreadable"], "d"),
        (["learner.clip_epsilon=0.1"], "b"),
        (["seed=3"], "c"),
        (["collisions>1"], "a"),
        (["networks.hidden_sizes=[256,256]"], "cab"),
        (["slow"], "b"),
        (["navigation", "state=finished", "evaluation<0.7"], "a"),
        (["nothing of this"], ""),
    ],
)
def test_runs_are_filtered_by_conditions(conditions, expected):
    assert names(*conditions) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sort": "evaluation"}, "bacd"),
        ({"sort": "evaluation", "reverse": True}, "abcd"),
        ({"sort": "run"}, "abcd"),
        ({"sort": "age"}, "bacd"),
        ({"sort": "learner.clip_epsilon", "reverse": True}, "bacd"),
        ({"sort": "collisions"}, "abcd"),
    ],
)
def test_runs_are_sorted_with_those_that_lack_the_field_last(options, expected):
    assert names(**options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sort": "evalution"}, "did you mean evaluation"),
        ({"conditions": ["clip_epsilon=1"]}, "did you mean learner.clip_epsilon"),
        ({"conditions": ["evaluation>high"]}, "'high' is not a number"),
    ],
)
def test_unknown_fields_and_values_are_refused_with_a_hint(options, message):
    with pytest.raises(ConfigError, match=message):
        rows_of(RUNS, NOW, **options)


def test_lines_show_what_differs_from_the_recipe_and_why_a_run_cannot_be_read():
    head, *table = lines(rows_of(RUNS, NOW, sort="run"))
    assert head.split() == [
        *("run", "task", "changes", "seed", "frames", "state", "return", "evaluation", "age", "tags", "collisions")
    ]
    assert "0.5 [0.4, 0.6]" in table[0]
    assert "navigation, clip_epsilon 0.1" in table[1]
    assert '2 d  "too slow"' in table[1]
    assert "6,000 of 84,000  unfinished" in table[2]
    assert "damaged or replaced" in table[3]
    assert "unreadable" in table[3]


def test_page_sorts_filters_links_and_shows_text_as_text(tmp_path: Path):
    attack = "</script><img src=x onerror=alert(1)>"
    (tmp_path / "study-1").mkdir()
    (tmp_path / "study-1" / "study.html").write_text("")
    summaries = [replace(RUNS[0], page="a b/report.html"), *RUNS[1:], RunSummary(attack, attack, problem=attack)]
    page = tmp_path / "runs.html"
    page.write_text(build(str(tmp_path), rows_of(summaries, NOW, sort="run"), tmp_path))
    assert page.stat().st_size < 100_000
    with chromium() as browser:
        emulate(browser, 375, 800)
        open_page(browser, page)

        def shown() -> list[str]:
            rows = browser.find_elements(By.CSS_SELECTOR, "#runs tbody tr")
            return [row.find_elements(By.TAG_NAME, "td")[1].text for row in rows if row.is_displayed()]

        assert shown() == [attack, "a", "b", "c", "d"]
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
        links = [link.get_attribute("href") for link in browser.find_elements(By.CSS_SELECTOR, "a")]
        assert links == [
            (tmp_path / "study-1" / "study.html").as_uri(),
            (tmp_path / "a b" / "report.html").as_uri(),
        ]
        heads = {head.text: head for head in browser.find_elements(By.CSS_SELECTOR, "th button")}
        browser.execute_script("arguments[0].click()", heads["evaluation"])
        assert shown()[:2] == ["b", "a"]
        browser.execute_script("arguments[0].click()", heads["run"])
        assert shown()[1:] == ["a", "b", "c", "d"]
        browser.find_element(By.ID, "filter").send_keys("unfinished")
        assert shown() == ["c"]
        box = browser.find_element(By.CSS_SELECTOR, "#runs tbody tr:not([hidden]) input")
        browser.execute_script("arguments[0].click()", box)
        assert browser.find_element(By.CSS_SELECTOR, "#command code").text == "mappo report runs/c"
        assert complaints(browser) == []
        assert requests(browser) == []

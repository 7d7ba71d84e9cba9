"""The page of a study in a browser, made of trials that nobody trained."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mappo.config import override
from mappo.evaluation.comparison import compare
from mappo.promotion.promotion import PromotionSkipped
from mappo.recipes import recipe
from mappo.reporting.study_page import build
from mappo.reporting.study_result import COMPARISON, PAGE, result_lines, verdict
from mappo.reporting.tables import STUDY_NAMES, best_lines
from mappo.stages.runtime import write_json
from mappo.tuning.database import Database
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import Choices, FloatRange, IntRange, applied
from mappo.tuning.study import Study
from mappo.tuning.study_config import TuningConfig
from mappo.tuning.worker import trial_run
from tests.evaluation.test_comparison import seeds
from tests.support.browser import chromium, complaints, emulate, open_page, requests
from tests.support.services import wait

CONFIG = recipe("navigation")
SPACE = {
    "learner.learning_rate": FloatRange("float", 1e-4, 1e-2, log=True),
    "learner.epochs": IntRange("int", 2, 30, log=True),
    "networks.critic": Choices("categorical", ("central", "own")),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """A study of 12 trials, of which three are pruned; the value depends on the learning rate."""
    directory = tmp_path_factory.mktemp("study")
    database = Database(f"sqlite:///{directory}/studies.db")
    plan = Plan(CONFIG, SPACE, TuningConfig(pruner="none"))
    study = Study.prepare(database, "example", plan, 12, store=str(directory))
    while claim := study.claim(f"worker-{len(study.trials()) % 2}"):
        value = 1.0 - abs(math.log10(claim.values["learner.learning_rate"]) + 2.4) / 3
        for frames in (30_000, 60_000, 84_000):
            claim.report_frames(frames, value * frames / 84_000)
        if claim.number % 4 == 3:
            claim.finish("pruned", None, "below the median")
        else:
            claim.finish("complete", value)
    yield study
    database.close()


def compared(study: Study, gain: float):
    best = applied(CONFIG, study.best().values)
    return compare(seeds(CONFIG, {7: 0.5, 8: 0.6}) + seeds(best, {7: 0.5 + gain, 8: 0.6 + gain}))


@pytest.fixture(params=[(1280, False), (375, True)], ids=["wide and light", "phone and dark"])
def page(request, study):
    """A browser with the page of the study."""
    width, is_dark = request.param
    directory = Path(study.store)
    run = directory / trial_run(1, study.trials()[1].values, 0)
    run.mkdir(parents=True, exist_ok=True)
    path = directory / PAGE
    path.write_text(build(study, study.best(), compared(study, 1.0), PromotionSkipped("example"), directory))
    with chromium() as browser:
        emulate(browser, width, 900, is_dark=is_dark)
        open_page(browser, path)
        wait(lambda: browser.execute_script("return document.body.dataset.plots"), 30, "no plots")
        assert complaints(browser) == []
        assert requests(browser) == []
        yield browser, width, is_dark


def luminance(colour: str) -> float:
    """The relative luminance of #rrggbb or rgb(r, g, b), from 0 to 1."""
    if colour.startswith("#"):
        red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    else:
        red, green, blue = (int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def test_best_trials_stand_out_and_trials_have_links_in_both_schemes_and_on_a_phone(page, study):
    browser, width, is_dark = page
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    background = luminance(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (background < 0.5) == is_dark
    traces = "Array.from(document.querySelectorAll('.js-plotly-plot')).flatMap((plot) => plot._fullData)"
    scales = browser.execute_script(
        f"return {traces}.filter((trace) => trace.meta === 'scale').map((trace) => trace.marker.colorscale)"
    )
    assert len(scales) == 1 + len(SPACE)  # the values, and one plot for each setting
    lines = browser.execute_script(
        f"return {traces}.filter((trace) => trace.meta?.share !== undefined)"
        ".map((trace) => [trace.meta.share, trace.line.color])"
    )
    assert len(lines) == 9
    scales.append([[share, colour] for share, colour in sorted(lines)])
    for scale in scales:
        contrasts = [abs(luminance(colour) - background) for _, colour in scale]
        assert contrasts == sorted(contrasts)
        assert contrasts[-1] > 0.5

    text = browser.find_element("tag name", "body").text
    assert "The best is better than the default" in text
    assert "Trained again" not in text  # no run of this study has a page
    (link,) = (
        link.get_attribute("href")
        for link in browser.find_elements("css selector", "td a")
        if link.get_attribute("href").endswith("seed-0/")
    )
    assert link == (Path(study.store) / trial_run(1, study.trials()[1].values, 0)).as_uri() + "/"
    for title in ("Value by learning_rate", "Value by epochs", "Value by critic", "All settings at once"):
        assert title in text
    assert f"best, trial {study.best().number}" in text
    assert "default, trial 0" in text


def test_result_names_default_and_best_the_verdict_and_the_page(study):
    best, directory = study.best(), Path(study.store)
    (directory / COMPARISON).unlink(missing_ok=True)
    assert "not trained again yet: mappo study resume example" in result_lines(study, best)[0]
    write_json(directory / COMPARISON, compared(study, 1.0))
    (directory / PAGE).write_text("")
    lines = result_lines(study, best)
    assert [line.split()[0] for line in lines[1:3]] == [*STUDY_NAMES]
    assert lines[-2].startswith("The best is better than the default: 1 [")
    assert lines[-1] == f"page: {(directory / PAGE).as_uri()}"
    other = replace(best, values=study.trials()[0].values)
    assert "that of an earlier best" in result_lines(study, other)[0]


def test_verdict_and_best_say_when_the_default_was_best(study):
    default = replace(study.best(), values=study.trials()[0].values, number=0)
    assert best_lines(default, CONFIG)[0].endswith(": the default was best")
    assert len(best_lines(study.best(), CONFIG)) == 1 + sum(
        json.loads(json.dumps(value)) != getattr(getattr(CONFIG, path.split(".")[0]), path.split(".")[1])
        for path, value in study.best().values.items()
    )
    assert verdict(compare(seeds(CONFIG, {7: 0.5, 8: 0.6})))[1].startswith("The default was best")
    assert verdict(compared(study, -1.0))[0] == "problem"
    mixed = compare(
        seeds(CONFIG, {7: 0.5, 8: 0.6}) + seeds(override(CONFIG, {"learner": {"epochs": 3}}), {7: 0.6, 8: 0.5})
    )
    assert verdict(mixed)[1].startswith("The data show no difference from the default")

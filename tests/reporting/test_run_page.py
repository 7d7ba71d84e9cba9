"""The page of a run in a real browser: its content and animation, without console errors and network requests."""

import html
import json
from dataclasses import asdict, replace

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from mappo.__main__ import main
from mappo.config import override
from mappo.evaluation.evaluation import evaluate
from mappo.evaluation.rollouts import record
from mappo.evaluation.statistics import Estimate
from mappo.reporting import run_page
from mappo.reporting.plots import training_plots
from mappo.reporting.run_page import build
from mappo.reporting.run_record import RunRecord, of_checkpoint
from mappo.strict_json import to_dict
from mappo.training.history import COLUMNS
from tests.support.browser import chromium, complaints, emulate, open_page, requests
from tests.support.services import wait


@pytest.fixture(scope="module")
def whole(checkpoint) -> RunRecord:
    """The complete record of a real run."""
    evaluation = evaluate(checkpoint.config, checkpoint)
    rollouts = asdict(record(checkpoint.config, checkpoint, evaluation))
    return of_checkpoint("first", checkpoint, checkpoint.history, evaluation, rollouts)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def look(browser, tmp_path):
    """A function that opens the page of records; the page must write no console message and send no request."""

    def open_records(*records: RunRecord, **options) -> None:
        path = tmp_path / "page.html"
        path.write_text(build(records, **options))
        complaints(browser), requests(browser)
        open_page(browser, path)
        wait(lambda: browser.execute_script("return document.body.dataset.plots"), 30, "no plots")
        assert complaints(browser) == []
        assert requests(browser) == []

    return open_records


def text(browser) -> str:
    return browser.find_element(By.TAG_NAME, "body").text


def frame(browser) -> int:
    return int(browser.find_element(By.TAG_NAME, "canvas").get_attribute("data-frame"))


def test_page_has_the_numbers_of_the_evaluation_and_the_configuration(look, browser, whole):
    look(whole)
    page_text = text(browser)
    mean = whole.evaluation.trained.mean
    assert f"{mean.value:.3g} [{mean.low:.3g}, {mean.high:.3g}]" in page_text
    assert "resampled: evaluation episodes" in page_text
    collisions = whole.evaluation.trained.measurements["agent_collisions"]
    assert "agent_collisions (sum)" in page_text
    assert str(collisions) in page_text
    assert "learner.clip_epsilon" in page_text
    assert "360" in page_text
    for title in ("Return", "Entropy", "Critic", "Time by phase", "Returns in evaluation"):
        assert title in page_text
    assert len(browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .main-svg")) >= 10


def test_episodes_can_be_played_paused_sought_and_changed(look, browser, whole):
    look(whole)
    button = browser.find_element(By.CSS_SELECTOR, "[data-player=play]")
    button.click()
    wait(lambda: frame(browser) > 2, 20, "the animation does not move")
    button.click()
    paused_frame = frame(browser)
    slider = browser.find_element(By.CSS_SELECTOR, "[data-player=frame]")
    browser.execute_script("arguments[0].value = 1; arguments[0].dispatchEvent(new Event('input'))", slider)
    assert frame(browser) == 1 != paused_frame
    previous = pixels(browser)
    browser.execute_script("arguments[0].value = 9; arguments[0].dispatchEvent(new Event('input'))", slider)
    assert pixels(browser) != previous
    label = browser.find_element(By.CSS_SELECTOR, "[data-player=label]")
    browser.execute_script("arguments[0].value = 'worst'; arguments[0].dispatchEvent(new Event('change'))", label)
    assert frame(browser) == 0


def beside(browser, policy: str) -> None:
    Select(browser.find_element(By.CSS_SELECTOR, "[data-player=beside]")).select_by_value(policy)


def pixels(browser) -> str:
    return browser.execute_script("return document.querySelector('canvas').toDataURL()")


def test_agents_are_drawn_at_their_recorded_positions(look, browser, whole):
    """The canvas has the agent's colour at the pixel of the agent's position, which this test computes itself."""
    look(whole)
    beside(browser, "")
    canvas = "const c = document.querySelector('canvas');"
    width, height = browser.execute_script(f"{canvas} return [c.width, c.height]")
    from mappo.evaluation.rollouts import Series, values

    trained = [episode for episode in whole.rollouts["episodes"] if episode["policy"] == "trained"]
    (episode,) = (episode for episode in trained if episode["label"] == "median")
    poses = values(Series(**episode["poses"]))
    agents = [index for index, entity in enumerate(episode["entities"]) if entity["kind"] == "agent"]
    margin = 2 * max(episode["entities"][agents[0]]["size"])
    reach = max(1.0, *(abs(poses[:, index, :2]).max() + margin for index in agents))
    zoom = whole.rollouts["view"]["zoom"]
    assert reach <= zoom or zoom == 1.0
    for index in agents:
        entity = episode["entities"][index]
        half = [max(zoom, *(abs(poses[:, agent, axis]).max() + margin for agent in agents)) for axis in (0, 1)]
        scale = min(width / (2 * half[0]), height / (2 * half[1]))
        x = width / 2 + scale * poses[0, index, 0]
        y = height / 2 - scale * (poses[0, index, 1] - 0.5 * entity["size"][0])  # below the line of its direction
        red, green, blue, _ = browser.execute_script(
            f"{canvas} return Array.from(c.getContext('2d').getImageData(arguments[0], arguments[1], 1, 1).data)",
            round(x),
            round(y),
        )
        expected = [255 * part for part in entity["colours"][0][1][:3]]
        assert [red, green, blue] == pytest.approx(expected, abs=60), (index, x, y)


def test_page_works_in_a_frame_that_allows_scripts_only(browser, whole, tmp_path):
    """Check the page in a frame such as the one of Kubeflow's UI."""
    page = html.escape(build([whole]), quote=True)
    path = tmp_path / "frame.html"
    path.write_text(f'<iframe sandbox="allow-scripts" style="width:100%;height:2000px" srcdoc="{page}"></iframe>')
    complaints(browser)
    open_page(browser, path)
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    wait(lambda: browser.execute_script("return document.body.dataset.plots"), 30, "no plots")
    browser.find_element(By.CSS_SELECTOR, "[data-player=play]").click()
    wait(lambda: frame(browser) > 1, 20, "the animation does not move")
    browser.switch_to.default_content()
    assert complaints(browser) == []


def test_page_fits_a_phone_with_a_dark_scheme(whole, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(build([whole]))
    with chromium() as phone:
        emulate(phone, 375, 900, is_dark=True)
        open_page(phone, path)
        wait(lambda: phone.execute_script("return document.body.dataset.plots"), 30, "no plots")
        assert phone.execute_script("return document.documentElement.scrollWidth") <= 375
        assert phone.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(24, 24, 27)"
        assert complaints(phone) == []


def test_page_of_two_runs_compares_them_and_lists_their_differences(look, browser, whole, checkpoint):
    other = override(checkpoint.config, {"learner": {"clip_epsilon": 0.3}, "seed": 1})
    look(whole, replace(whole, name="second", config=to_dict(other), rollouts=None))
    page_text = text(browser)
    assert "learner.clip_epsilon" in page_text
    assert "0.2 -> 0.3" in page_text
    assert "probability of improvement" in page_text
    assert "0.5 [" in page_text  # equal returns


def test_page_names_the_learning_algorithms(whole, checkpoint):
    assert "A run of multi-agent proximal policy optimisation (MAPPO): " in build([whole])
    other = to_dict(override(checkpoint.config, {"networks": {"critic": "own"}}))
    page = build([whole, replace(whole, name="second", config=other)])
    assert (
        "2 runs of multi-agent proximal policy optimisation (MAPPO) and independent proximal policy optimisation "
        "(IPPO): "
    ) in page
    old = to_dict(checkpoint.config)
    del old["networks"]["critic"]
    assert "(MAPPO)" in build([replace(whole, config=old)])


def test_numbers_over_training_seeds_match_the_evaluations(look, browser, whole, checkpoint):
    """Compare two configurations with two seeds each, whose mean returns are 1, 2, 3 and 6."""
    records = []
    for seed, clip_epsilon, value in ((0, 0.2, 1.0), (1, 0.2, 2.0), (0, 0.3, 3.0), (1, 0.3, 6.0)):
        config = to_dict(override(checkpoint.config, {"learner": {"clip_epsilon": clip_epsilon}, "seed": seed}))
        returns = replace(whole.evaluation.trained, mean=Estimate(value, value, value))
        evaluation = replace(whole.evaluation, training_config=config, trained=returns)
        records.append(RunRecord(f"run-{value:.0f}", config, whole.history, evaluation))
    look(*records)
    cells = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "td")]
    (row,) = (
        cells[index : index + 6]
        for index, cell in enumerate(cells)
        if cell.startswith("learner.clip_epsilon 0.2") and cells[index + 1] == "0, 1"
    )
    assert "Student's t intervals over training seeds" in text(browser)
    assert row[1] == "0, 1"
    assert row[2].startswith("4.5 [")
    assert row[3].startswith("3 [")
    assert row[4].startswith("4.5 [")
    assert row[5] == "1 [1, 1]"
    duplicate = replace(records[1], name="twice", config=records[0].config, evaluation=records[0].evaluation)
    look(records[0], duplicate)
    assert "Not compared over training seeds: seed 0: trained and evaluated more than once" in text(browser)


def line(**cells: float) -> str:
    return ",".join(str(cells.get(column, "")) for column in COLUMNS)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [line(iteration=1, frames=100)],
        [line(iteration=step, frames=100 * step, kl="nan", entropy="inf") for step in range(1, 9)],
    ],
)
def test_empty_and_undefined_histories_make_a_page(look, browser, whole, rows):
    history = "\n".join([",".join(COLUMNS), *rows]) + "\n"
    look(replace(whole, history=history, evaluation=None, rollouts=None))
    assert "not evaluated yet" in text(browser)
    assert ("The history has no iteration" in text(browser)) == (not rows)


def test_measurements_in_evaluations_during_training_are_curves_if_there_are_any(look, browser, whole):
    header = ",".join([*COLUMNS, "measured_hits", "measured_<b>never</b>"])
    rows = [f"{line(iteration=step, frames=100 * step)},{step % 2 and 0.5},{''}" for step in range(1, 9)]
    look(replace(whole, history="\n".join([header, *rows]) + "\n"))
    titles = [title.text for title in browser.find_elements("css selector", "h3")]
    assert "hits" in titles
    assert not [title for title in titles if "never" in title]


def test_names_and_values_are_escaped(look, browser, whole):
    attack = '</script><script>document.title = "taken"</script><img src=x onerror=alert(1)>'
    config = to_dict(
        override(run_page.from_dict(whole.config), {"environment": {"scenario_kwargs": {"a": attack}}})
    )
    look(replace(whole, name=attack, config=config, facts={attack: attack}))
    assert browser.title != "taken"
    assert attack in text(browser)


def test_page_has_no_episodes_when_they_would_make_it_too_large(whole, monkeypatch):
    monkeypatch.setattr(run_page, "MAX_BYTES", len(build([whole]).encode()) - 1)
    page = build([whole])
    assert "Episodes are left out" in page
    assert "<canvas" not in page


def test_page_is_far_below_the_size_limit_of_kubeflow(whole):
    assert len(build([whole]).encode()) < 6_000_000


def test_headline_says_which_checkpoint_was_judged_after_how_many_frames(whole):
    judged = replace(whole.evaluation, training_frames=120)
    page = build([replace(whole, evaluation=judged, best_frames=120)])
    assert "mean return of the best checkpoint, after 120 of 360 frames" in page
    page = build([replace(whole, evaluation=judged, best_frames=240)])
    assert "mean return of the checkpoint, after 120 of 360 frames" in page
    assert "the best is now that after 240; run `mappo evaluate`" in page
    other = to_dict(override(run_page.from_dict(whole.config), {"evaluation": {"episodes_per_seed": 2}}))
    page = build([replace(whole, evaluation=replace(judged, config=other))])
    assert "evaluation has other settings than the run: evaluation.episodes_per_seed 4 -&gt; 2" in page


def test_page_shows_the_returns_first_and_the_controls_within_the_first_screen(look, browser, whole):
    emulate(browser, 1280, 900)
    look(whole)
    top = "return document.querySelector(arguments[0]).getBoundingClientRect()"
    curve = browser.execute_script(top, "figure")
    assert browser.find_element(By.CSS_SELECTOR, "figure h3").text == "Return"
    assert curve["width"] > 1100
    controls = browser.execute_script(top, ".controls")
    assert curve["bottom"] < controls["bottom"] < 800
    label = Select(browser.find_element(By.CSS_SELECTOR, "[data-player=label]"))
    assert label.first_selected_option.text == "median"


def test_page_of_several_runs_begins_with_a_table(look, browser, whole):
    look(whole, replace(whole, name="second", evaluation=None, rollouts=None))
    order = [
        browser.execute_script("return document.querySelector(arguments[0]).getBoundingClientRect().top", selector)
        for selector in ("table", "figure.main", "canvas")
    ]
    assert order == sorted(order)
    first, second = (
        [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        for row in browser.find_element(By.TAG_NAME, "table").find_elements(By.CSS_SELECTOR, "tbody tr")
    )
    assert first[:4] == ["first", str(whole.evaluation.trained.mean), "360", "360"]
    assert second[:2] == ["second", "not evaluated"]


def test_band_of_returns_is_robust_against_outliers():
    """Means 0.05 apart, and one episode of -1000 in each iteration, which would flatten the curve."""
    rows = [
        {"frames": 100.0 * step, "episode_return_mean": step / 20, "episode_return_min": -1000.0}
        for step in range(1, 41)
    ]
    high, low, curve = json.loads(training_plots({"first": rows})[0].figure)["data"][:3]
    for lower, mean, upper in list(zip(low["y"], curve["y"], high["y"], strict=True))[2:-2]:
        assert lower < mean < upper
    assert low["y"][20] == pytest.approx(0.97)  # of 0.95, 1, 1.05, 1.1 and 1.15, the quantile at 10 %
    assert high["y"][20] == pytest.approx(1.13)


def test_report_uses_the_stored_evaluation_of_a_run(tmp_path, capsys):
    from tests.cli.test_main import TINY

    assert main(["train", "--store", str(tmp_path), "--run", "first", *TINY]) == 0
    run = tmp_path / "first"
    page = run / "report.html"
    assert main(["report", str(run)]) == 0
    assert f"page: {page.as_uri()}" in capsys.readouterr().out
    assert "not evaluated yet" in page.read_text()
    assert main(["evaluate", str(run)]) == 0
    assert f"page: {page.as_uri()}" in capsys.readouterr().out
    assert "<canvas" in page.read_text()

    own = {name: (run / name).read_bytes() for name in ("evaluation.json", "rollouts.json")}
    best_frames = json.loads(own["evaluation.json"])["training_frames"]
    assert main(["evaluate", str(run), "--checkpoint", "1" if best_frames == 120 else "2"]) == 0
    assert main(["evaluate", str(run), "--evaluation.episodes-per-seed", "2"]) == 0
    assert {name: (run / name).read_bytes() for name in own} == own
    assert len(list((run / "evaluations").iterdir())) == 2
    assert "Other evaluations of this run" in page.read_text()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--learner.clip-epsilon", "0.1", "--seed", "9"]) == 2
    refused = capsys.readouterr().err
    assert "learner.clip_epsilon = 0.2 -> 0.1: the run was trained with the former" in refused
    assert "seed = 0 -> 9" in refused

    (run / "evaluation.json").write_text('{"config": 1}')
    assert main(["report", str(run), "--output", str(tmp_path / "broken.html")]) != 0
    assert "evaluation.json: not an evaluation report" in capsys.readouterr().out
    assert main(["report", str(run), str(run)]) != 0
    assert "every run may appear once" in capsys.readouterr().out

"""The comparison of a frame on the page with VMAS's own renderer, which needs OpenGL and a display."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from mappo.config import override
from mappo.environment.random_streams import Stream
from mappo.evaluation.episodes import play_episodes, trained_policy
from mappo.evaluation.evaluation import evaluate
from mappo.evaluation.rollouts import record
from mappo.reporting.run_page import build
from mappo.reporting.run_record import of_checkpoint
from tests.support.browser import chromium, open_page
from tests.support.services import missing, wait

FRAME = 5
TOLERANCE = 0.01  # as a share of the picture's width
_PIXELS = """
const canvas = document.querySelector('canvas'), [red, green, blue] = arguments[0];
const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
const xs = [], ys = [];
const onWhite = (i, part) => data[i + part] * data[i + 3] / 255 + 255 - data[i + 3];
for (let i = 0; i < data.length; i += 4)
  if (Math.abs(onWhite(i, 0) - red) + Math.abs(onWhite(i, 1) - green) + Math.abs(onWhite(i, 2) - blue) < 30) {
    xs.push((i / 4) % canvas.width); ys.push(Math.floor(i / 4 / canvas.width));
  }
const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
const height = canvas.height;  // the canvas may be wider than the square that VMAS draws, which is in its middle
return [0.5 + (median(xs) - canvas.width / 2) / height, median(ys) / height, xs.length / height / height];
"""


@pytest.fixture
def display(monkeypatch) -> Iterator[None]:
    """A virtual display (Xvfb)."""
    if not shutil.which("Xvfb"):
        missing("Xvfb", "sudo apt install xvfb libgl1 libglu1-mesa")
    reader, writer = os.pipe()
    command = ["Xvfb", "-displayfd", str(writer), "-screen", "0", "1024x768x24"]
    with subprocess.Popen(command, pass_fds=[writer], stderr=subprocess.DEVNULL) as server:
        try:
            monkeypatch.setenv("DISPLAY", f":{os.read(reader, 20).decode().strip()}")
            yield
        finally:
            server.terminate()


def _on_white(colour: list[float]) -> list[float]:
    return [255 * (share * colour[3] + 1 - colour[3]) for share in colour[:3]]


def _in_vmas(image: np.ndarray, colour: list[float]) -> list[float]:
    """Return the median position of a colour, as shares of width and height, and the share of its pixels.

    The outlines of agents have few pixels, so they hardly change the result.
    """
    matches = np.abs(image.astype(int) - np.array(colour)).sum(-1) < 30
    rows, columns = matches.nonzero()
    return [np.median(columns) / image.shape[1], np.median(rows) / image.shape[0], matches.mean()]


@pytest.mark.long
def test_a_frame_has_every_entity_where_vmas_draws_it(display, checkpoint, tmp_path):
    """Compare the positions and sizes of two agents and their goals, found by colour, in both pictures.

    The tolerances allow for the lines that each renderer draws over the entities.
    """
    config = override(checkpoint.config, {"evaluation": {"seeds": [1], "episodes_per_seed": 1}})
    rollouts = record(config, checkpoint, evaluate(config, checkpoint))
    images: list[np.ndarray] = []

    def render(environment, running, reward) -> None:
        images.append(
            environment.base_env._env.render(mode="rgb_array", env_index=0, visualize_when_rgb=False)
            if len(images) == FRAME
            else np.zeros(())
        )

    play_episodes(trained_policy(config, checkpoint), config, config.evaluation, Stream.EVALUATION, render)
    page = tmp_path / "page.html"
    page.write_text(build([of_checkpoint("r", checkpoint, checkpoint.history, None, asdict(rollouts))]))
    colours = [_on_white(entity.colours[0][1]) for entity in rollouts.episodes[0].entities]
    with chromium() as browser:
        open_page(browser, page)
        wait(lambda: browser.execute_script("return document.body.dataset.plots"), 30, "no plots")
        Select(browser.find_element(By.CSS_SELECTOR, "[data-player=beside]")).select_by_value("")
        slider = browser.find_element(By.CSS_SELECTOR, "[data-player=frame]")
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        browser.execute_script(script, slider, FRAME)
        page_results = [browser.execute_script(_PIXELS, colour) for colour in colours]
    vmas_results = [_in_vmas(images[FRAME], colour) for colour in colours]
    for result, expected in zip(page_results, vmas_results, strict=True):
        assert result[:2] == pytest.approx(expected[:2], abs=TOLERANCE)
        assert 0.6 < result[2] / expected[2] < 1.5
    assert len(colours) == 4

import re
import subprocess
import sys

from benchmarks import recipes, startup, tuning
from tests.test_main import TINY


def test_recipes_are_trained_evaluated_and_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes", "navigation", "balance", "--seeds", "0,3", *TINY])
    recipes.main()
    table = capsys.readouterr().out.rsplit("\n\n", maxsplit=1)[1].splitlines()
    assert [row.split()[:3] for row in table[1:]] == [
        [name, seed, "120"] for name in ("navigation", "balance") for seed in ("0", "3")
    ]


def test_ways_to_tune_are_compared_at_equal_time(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tuning", "rate", "navigation", "--minutes", "0.001", *TINY])
    tuning.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row[1:] for row in rows if row and row[0] in ("mappo", "plain", "torchrl")}
    assert list(table) == ["mappo", "plain", "torchrl"]
    for trials, minutes, an_hour, best, held_out in table.values():
        assert int(trials) == 1
        assert float(minutes) >= 0
        assert float(an_hour) > 0
        assert -10 < float(best) < 10
        assert -10 < float(held_out) < 10


def test_what_a_study_costs_is_a_ratio_to_a_plain_loop(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tuning", "overhead", "navigation", "--trials", "1", *TINY])
    tuning.main()
    assert re.search(r"^ratio \d+\.\d+ \(", capsys.readouterr().out, re.MULTILINE)


def test_what_start_up_is_measured_with_starts():
    done = subprocess.run(
        [sys.executable, *startup.COMMANDS["first frame"]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr

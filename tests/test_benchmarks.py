import sys

from benchmarks import recipes
from tests.test_main import TINY


def test_recipes_are_trained_evaluated_and_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes", "navigation", "balance", "--seeds", "0,3", *TINY])
    recipes.main()
    table = capsys.readouterr().out.rsplit("\n\n", maxsplit=1)[1].splitlines()
    assert [row.split()[:3] for row in table[1:]] == [
        [name, seed, "120"] for name in ("navigation", "balance") for seed in ("0", "3")
    ]

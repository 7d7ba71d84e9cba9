"""Studies: settings, trials, workers and their database.

Start with `study`. Only this wing and its page import optuna.
"""

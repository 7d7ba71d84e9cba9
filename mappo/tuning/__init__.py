"""The tuning studies: their settings, trials, workers and database.

Start with `study`. Only this package and its page import optuna.
"""

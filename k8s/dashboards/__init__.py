"""The Grafana dashboards, one module for each dashboard, and the queries and panels that they share.

Start with `training_run`.
"""

"""The Grafana dashboards, one file each.

Start with `training_run`. Queries and panels that they share are here too.
"""

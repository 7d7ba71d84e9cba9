"""Metrics for Prometheus and TensorBoard. Start with `monitor`. Monitoring never makes a stage fail."""

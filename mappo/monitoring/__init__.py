"""The metrics for Prometheus and TensorBoard. Start with `monitor`. Failed monitoring never fails a stage."""

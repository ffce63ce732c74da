"""The wing of recommendation: features, gates, tasks, models and metrics."""

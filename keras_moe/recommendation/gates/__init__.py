"""Experts that several tasks mix, each task with its own gate."""

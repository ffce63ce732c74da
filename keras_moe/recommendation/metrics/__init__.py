"""Metrics of rankings and probabilities, for labels that may be missing."""

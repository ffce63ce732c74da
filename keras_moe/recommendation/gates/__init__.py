"""Experts that several tasks mix, each by a gate of its own."""

"""Layers of published recommendation models."""

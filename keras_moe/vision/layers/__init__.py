"""Layers of published vision models."""

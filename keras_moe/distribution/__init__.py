"""Experts over many devices, with each backend's own distribution engine."""

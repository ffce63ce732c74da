"""Experts over many devices."""

"""Layers that hold many networks, and copies and seeds for their parts."""

"""Many networks held in one variable: layers, draws, seeds and copies."""

"""Tasks: their heads, losses and weightings, and the model they train."""

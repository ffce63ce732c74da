"""Tasks, their heads, losses and weightings: what all such models share."""

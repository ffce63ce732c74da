"""Features of recommendation models, and how they are embedded."""

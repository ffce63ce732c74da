"""Ready-made recommendation models, from a dict of features to one of tasks."""

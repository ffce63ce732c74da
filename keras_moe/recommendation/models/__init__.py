"""Ready-made recommendation models: a dict of features in, one of tasks out."""

"""What each feature of a recommendation model is, and how it is embedded."""

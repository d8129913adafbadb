"""Speed reports: `pytest --benchmark` from the repository's root."""

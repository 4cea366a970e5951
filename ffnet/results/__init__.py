"""What a run found: the schema of `result.json`, compared images and models, and published values."""

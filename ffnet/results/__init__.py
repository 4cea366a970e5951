"""Results: the schema of result.json, accuracy recovery, image comparisons, published values, several models."""

"""Pictures to training data: sources => shards of moments => batches."""

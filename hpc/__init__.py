"""A batch toolkit for sharded data and chains of jobs. Knows nothing of models."""

"""Device memory of a training job, rank by rank and kind by kind, from the sizes of its model alone."""

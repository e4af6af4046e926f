"""Running a pipeline schedule: one loop over a rank's actions, its messages, its weight gradients, its failures."""

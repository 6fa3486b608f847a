"""Runs trainings through Ray and records them in MLflow: the command line, the driver, the way to the store."""

"""Runs trainings through Ray and records them in MLflow: the command line, the driver, the record's way to the store."""

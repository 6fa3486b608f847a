"""What a sweep searches: spaces over the paths of a RunConfig. Imports `trainers.config` alone."""

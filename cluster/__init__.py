"""Submitting runs to a Ray cluster. Imports none of our packages: it speaks to `orchestrate` by its command line."""

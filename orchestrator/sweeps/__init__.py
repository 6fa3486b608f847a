"""Sweeps: many trials of one preset, searched, stopped early, and recorded so that a killed sweep goes on."""

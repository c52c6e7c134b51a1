"""Suites: what of a model is to be measured, in a file, so that it is measured the same way every time."""

"""Exports of a batch's results: one reader over its rows, one small writer per format."""

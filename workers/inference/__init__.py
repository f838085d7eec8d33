"""Inference: from a claimed chunk or chat request to text."""

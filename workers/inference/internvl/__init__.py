"""A compact implementation of the InternVL2 architecture: InternViT, projector, InternLM2.

It reads checkpoints by their published tensor names and config keys, and writes its own.
"""

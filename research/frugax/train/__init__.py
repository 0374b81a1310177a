"""Sharded training: mesh, data, step, checkpoint, metrics and the loop."""

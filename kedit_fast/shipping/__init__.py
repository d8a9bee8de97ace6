"""Edits that leave the machine they were made on: adapters, merged checkpoints and their undo, versioned folders."""

"""An edit as data: its changes, chains of edits, their sum and difference, and how one is written into a model."""

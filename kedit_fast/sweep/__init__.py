"""The layer-major sweep: packs of rows go up the model one layer at a time. Jobs read and write them at sites."""

"""Model families, weight sources and the open model."""

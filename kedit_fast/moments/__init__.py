"""Second moments of keys, and the text that they are measured on."""

"""Studies that edit many times: in rounds on top of each other, and at each layer."""

"""Jobs: what is read or written in a sweep. None knows another, none knows a fact."""

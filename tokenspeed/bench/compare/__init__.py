"""`bench compare`: engines against each other, alternately, on the same work."""

"""Tables and pictures of result files."""

"""The page of `inspect --html`: one file, nothing requested."""

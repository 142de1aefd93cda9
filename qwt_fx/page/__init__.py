"""The page of `qwt-fx inspect --html`: one file, charts drawn here as SVG, nothing requested."""

"""The demo: a small CLIP with its data, shipped in the package, and how it is made hard."""

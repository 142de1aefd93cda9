"""Models and data that nobody here made, from public packages: fetched once, kept in a cache folder."""

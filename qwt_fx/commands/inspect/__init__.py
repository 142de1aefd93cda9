"""`qwt-fx inspect`: what it measures, on which data, for the table and the page."""

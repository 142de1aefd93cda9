"""`qwt-fx quantize`: its phases, what a cut-off run leaves, what tells runs apart."""

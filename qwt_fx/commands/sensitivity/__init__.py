"""`qwt-fx sensitivity`: what each width costs each layer, and the best widths under a budget."""

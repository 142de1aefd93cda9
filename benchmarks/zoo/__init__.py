"""Models of every kind, small and with random weights, that no pass was prepared for."""

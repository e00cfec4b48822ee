"""Ways to bring dead units back, and when to use them."""

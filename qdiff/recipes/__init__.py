"""The language of recipes: what is quantized, on which grids, and which stages calibrate it."""

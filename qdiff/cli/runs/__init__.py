"""Runs in folders of their own: batches of images, going on after an interruption, what is kept."""

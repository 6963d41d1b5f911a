"""Training data: images with labels and captions, in batches that depend on a seed and the batch's number alone."""

"""Data in, evaluation out: text to prepared sets, and their global batches to training workers. Ray Data."""

"""Data: files of rows, tokens, packed batches, and the quickstart's own data set."""

"""The build: sources in, a packed and shuffled data set out, the same bytes however often it was killed on the way."""

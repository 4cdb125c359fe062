"""What a study compares, a file a kind of method; `known` has their names."""

"""What may happen to a model between its method and its tasks; `known` has their names."""

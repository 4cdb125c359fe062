"""Questions about pictures: read from a folder, asked through a model's own processor, and painted for the report."""

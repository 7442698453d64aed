"""A comparison as a page that people look at, and as Markdown with the same tables."""

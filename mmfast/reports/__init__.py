"""What is told of a comparison: sentences, tables, pictures, a page."""

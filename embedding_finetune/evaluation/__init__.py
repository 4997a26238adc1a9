"""From rankings to measures, and from measures to tables, files and a page."""

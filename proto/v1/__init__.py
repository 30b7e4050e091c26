"""Version 1 of the schema and its generated stubs."""

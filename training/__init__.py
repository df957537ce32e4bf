"""How what the library carries was made; not part of the library."""

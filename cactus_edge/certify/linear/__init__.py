"""Linear bounds and complete search: what is decided where intervals leave a sample open."""

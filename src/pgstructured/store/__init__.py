"""Table stores: rows of one table, by filters that can carry nothing but values."""

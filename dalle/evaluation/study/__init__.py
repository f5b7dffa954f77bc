"""People compare the pictures of two systems: the page that asks them, and the count of their votes."""

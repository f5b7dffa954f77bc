"""Reading what runs have written."""

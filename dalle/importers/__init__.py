"""Published models of other programs, turned into directories of this one."""

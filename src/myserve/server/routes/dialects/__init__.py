"""Other servers' routes, one file each, over what this server has: no dialect has logic that another needs."""

"""All runs in a browser: curves that grow, what differs, answers side by side, votes. One process, one user."""

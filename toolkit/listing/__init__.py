"""All that lies under a folder of runs: what each is, which of it can go, and how much room that makes."""

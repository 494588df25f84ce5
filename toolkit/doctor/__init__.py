"""What this machine is, and whether a recipe can run on it, before anything is downloaded or paid for."""

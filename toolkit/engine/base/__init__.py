"""The loaded model and the card under it; what every other engine package needs."""

"""What a stage needs of a card, predicted before anything is loaded. Pure."""

"""What a training stage is asked for, before torch is loaded."""

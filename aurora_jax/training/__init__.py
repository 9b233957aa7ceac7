"""State, losses, step, schedule, checkpoint, loop."""

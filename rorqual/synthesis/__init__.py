"""Floor 4: tasks out of models and programs."""

"""Floor 2: meshes and wrappers applied to the model from outside."""

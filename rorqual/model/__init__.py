"""Floor 1: the DeepSeek-V3.2 architecture for one device, and its checkpoints."""

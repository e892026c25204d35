"""Floor 0: the DeepSeek-V3.2 chat format over strings and token ids; imports no torch."""

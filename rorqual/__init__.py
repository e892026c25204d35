"""Rorqual: the whole DeepSeek-V3.2 system as one open package. Importing it imports no room."""

__version__ = "0.1.0"

"""Edit Anatomy's core: edit a language model, look inside before and after, hand back tables. The map is README.md."""

__version__ = "0.1.0"

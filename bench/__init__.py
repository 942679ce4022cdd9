"""Measurements of speed and of promises: `make bench`. Each module measures one thing and gives rows."""

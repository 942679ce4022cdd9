"""The command line's commands, a file for each group; each has `add(commands)`, which registers them."""

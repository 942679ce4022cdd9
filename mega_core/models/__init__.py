"""Language models by their parts.

Where things are (arch), reading and changing them (adapter, hooks, tokens), getting one (loading, pool).
"""

"""The commands: one module each, imported when it is the one called. Each runs in a process of its own."""

"""The child processes: the zygote that imports a framework, and its forks, loaders and workers."""
